"""Swaps the layers of a model between torch.nn and nacre, in place."""

from dataclasses import dataclass, field

import torch

from nacre.blocks import BLOCKS
from nacre.core import check
from nacre.layers import LAYERS


@dataclass
class ConversionReport:
    """What :func:`convert` did.

    Attributes:
        converted: name of each swapped module, with its old and its new class.
        kept: name and class of each leaf module which stays as it was, with the reason.
    """

    converted: dict[str, tuple[str, str]] = field(default_factory=dict)
    kept: dict[str, tuple[str, str]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"converted {len(self.converted)} modules, kept {len(self.kept)}"]
        lines += [f"  {name or '(model)'}: {old} -> {new}" for name, (old, new) in self.converted.items()]
        lines += [f"  {name or '(model)'}: {kind} kept, {reason}" for name, (kind, reason) in self.kept.items()]
        return "\n".join(lines)


def convert(model: torch.nn.Module, to: str = "nacre", report: ConversionReport | None = None) -> torch.nn.Module:
    """Swaps every layer that nacre serves, in place, and returns the model.

    A module becomes an instance of the other class: it stays the same object with the same parameters, buffers,
    hooks, tied weights and mode, so that optimizers and references to it go on working. Only exact types are swapped:
    a subclass of a torch.nn layer is somebody's own layer and stays as it is.

    Args:
        model: any module; it may itself be one of the layers.
        to: ``"nacre"``, or ``"torch"`` to go back. Default: ``"nacre"``.
        report: filled with what was and was not converted, where given.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``to`` is neither of the two.

    Example:
        >>> import torch, nacre
        >>> model = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.BatchNorm1d(8))
        >>> report = nacre.ConversionReport()
        >>> model = nacre.convert(model, report=report)
        >>> type(model[0])
        <class 'nacre.layers.layer_norm.layer.LayerNorm'>
        >>> print(report)
        converted 1 modules, kept 1
          0: torch.nn.LayerNorm -> nacre.LayerNorm
          1: torch.nn.BatchNorm1d kept, nacre has no such layer
    """
    if not isinstance(model, torch.nn.Module):
        raise check.error(TypeError, "nacre.convert takes a torch.nn.Module", f"a {type(model).__name__}")
    if to not in ("nacre", "torch"):
        raise check.error(ValueError, "nacre.convert goes to 'nacre' or to 'torch'", f"to = {to!r}")
    report = ConversionReport() if report is None else report
    pairs = {spec.replaces: spec.layer for spec in (*LAYERS.values(), *BLOCKS.values()) if spec.replaces is not None}
    classes = pairs if to == "nacre" else {layer: replaced for replaced, layer in pairs.items()}
    parts: set[torch.nn.Module] = set()
    for name, module in model.named_modules():
        old = type(module)
        if old in classes:
            module.__class__ = classes[old]
            report.converted[name] = (_label(old), _label(classes[old]))
        if type(module) in classes.values():
            # an attention's out_proj holds weights which the attention reads itself
            parts.update(child for child in module.children() if type(child) not in classes)
        elif next(module.children(), None) is None and module not in parts:
            report.kept[name] = (_label(old), _reason(old, tuple(classes)))
    return model


def _label(kind: type) -> str:
    package = kind.__module__.split(".")[0]
    if package == "torch" and getattr(torch.nn, kind.__name__, None) is kind:
        return f"torch.nn.{kind.__name__}"
    return f"nacre.{kind.__name__}" if package == "nacre" else f"{kind.__module__}.{kind.__name__}"


def _reason(kind: type, served: tuple[type, ...]) -> str:
    base = next((known for known in kind.__mro__[1:] if known in served), None)
    if base is not None:
        return f"a subclass of {_label(base)} may compute something else"
    return "nacre has no such layer"
