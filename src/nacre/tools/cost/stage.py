"""A model on a stage: its tensors replaced for one run, and put back whatever happens."""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from nacre.core import check


@dataclass
class Stage:
    """What stands in for a model's tensors and inputs.

    Args:
        mode: the fake tensors' mode; None where the run is real.
        replaced: each tensor that was met, by its identity, with what stands in for it.
    """

    mode: Any = None
    replaced: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def tensor(self, original: Tensor) -> Tensor:
        """The stand-in: the same one for the same tensor, and one memory where views share one."""
        if id(original) not in self.replaced:
            new = self._stand_in(original)
            self.replaced[id(original)] = (original, new)
            if self.mode is not None and type(original) in _PLAIN:
                # code which reaches the original by another way than its module meets the same stand-in
                self.mode.fake_tensor_converter.set_tensor_memo(original, new)
        return self.replaced[id(original)][1]

    def _stand_in(self, original: Tensor) -> Tensor:
        if self.mode is None:
            new = original.detach()
        elif type(original) in _PLAIN or isinstance(original, fake_tensor()):
            new = self._fake(original)
        else:
            new = self.mode.from_tensor(original)  # a subclass of somebody's own
        if isinstance(original, nn.Parameter):
            return nn.Parameter(new, requires_grad=original.requires_grad)
        return new.requires_grad_(original.requires_grad) if new.is_leaf and original.requires_grad else new

    def _fake(self, original: Tensor) -> Tensor:
        device = original.device if original.device.type != "meta" else torch.device("cpu")
        with self.mode, torch.no_grad():
            if original.layout is not torch.strided:
                return self.mode.from_tensor(original.detach())
            new = torch.empty_strided(original.shape, original.stride(), dtype=original.dtype, device=device)
        if _countable(original):
            new.constant = original.clone()  # type: ignore[attr-defined]  # lengths and masks may decide what a model does
        return new

    def values(self, given: Any) -> Any:
        """Inputs with stand-ins for the tensors in them, wherever :func:`tensors` finds them."""
        return mapped(given, self.tensor)


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same value, of the same classes, with other tensors in it; what is no tensor stays what it is.

    Args:
        value: tensors in nested tuples, lists, mappings, dataclasses and namespaces.
        change: makes the other tensor.
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(item, change) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(mapped(item, change) for item in value)
    if isinstance(value, MutableMapping):
        other = copy.copy(value)
        for key, item in value.items():
            other[key] = mapped(item, change)
        return other
    if names := _fields(value):
        other = copy.copy(value)
        for name in names:  # of a frozen dataclass too
            object.__setattr__(other, name, mapped(getattr(value, name), change))
        return other
    return value


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists, mappings, dataclasses and namespaces; a packed sequence is a tuple."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    else:
        for name in _fields(value):
            yield from tensors(getattr(value, name))


def returned(result: Any) -> list[Tensor]:
    """The tensors in what a model returns, be it an object of somebody's own class."""
    return [*tensors(result)] or [*tensors(getattr(result, "__dict__", None))]


def _fields(value: Any) -> tuple[str, ...]:
    """What a dataclass or a namespace consists of."""
    if isinstance(value, SimpleNamespace):
        return tuple(vars(value))
    if isinstance(value, (type, nn.Module)):
        return ()
    return tuple(name for name in getattr(value, "__dataclass_fields__", ()) if hasattr(value, name))


_PLAIN = (Tensor, nn.Parameter, nn.Buffer)


@functools.cache
def fake_tensor() -> Any:
    """The class of fake tensors, whose import takes a while."""
    from torch._subclasses.fake_tensor import FakeTensor

    return FakeTensor


def _countable(tensor: Tensor) -> bool:
    """Whether a tensor's values stay known: whole numbers and masks, as long as they are few."""
    few = not tensor.is_floating_point() and not tensor.is_complex() and tensor.numel() <= 2**16
    return few and type(tensor) is Tensor and tensor.device.type == "cpu"


def known(tensor: Tensor) -> Tensor:
    """The values of a fake tensor, where they are known; the tensor itself otherwise."""
    constant: Tensor | None = getattr(tensor, "constant", None)
    return tensor if constant is None else constant


def is_real(values: list[Tensor]) -> bool:
    """Whether all tensors have values."""
    fake = fake_tensor()
    return not any(tensor.is_meta or isinstance(tensor, fake) for tensor in values)


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Runs a block apart from modes of the caller, as that of fake tensors, and a default device without values."""
    without_values = torch.get_default_device().type == "meta"
    with _disable_current_modes(), torch.device("cpu") if without_values else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def staged(model: nn.Module, real: bool) -> Iterator[Stage]:
    """Replaces parameters and buffers for the run of the block; then every module is as it was.

    Args:
        model: the model.
        real: let the stand-ins have values: parameters share theirs with the originals, without their gradients, and
            buffers are copies. Otherwise they are fake tensors, which take no memory; those of the device ``meta``
            stand for tensors on the CPU.

    Raises:
        ValueError: a module without its parameters yet.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    stage = Stage(None if real else FakeTensorMode(allow_non_fake_inputs=True))
    modules = list(model.modules())
    before = [_snapshot(module) for module in modules]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        for module in modules:
            parameters: dict[str, Any] = module._parameters
            for name, parameter in parameters.items():
                if parameter is None:
                    continue
                if nn.parameter.is_lazy(parameter):
                    rule = f"every module of a model has its parameters; {type(module).__name__} has not"
                    fix = "Call the model once on real inputs first."
                    raise check.error(ValueError, rule, f"{name} without a shape", fix)
                parameters[name] = stage.tensor(parameter)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.clone() if real else stage.tensor(buffer)
            if isinstance(module, nn.RNNBase):
                module._init_flat_weights()
        yield stage
    finally:
        for module, state in zip(modules, before, strict=True):
            _restore(module, state)
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _snapshot(module: nn.Module) -> list[tuple[str, Any, Any]]:
    """A module's attributes, and what is in those which are lists and dicts."""
    return [
        (name, value, value.copy() if isinstance(value, (list, dict)) else None)
        for name, value in module.__dict__.items()
    ]


def _restore(module: nn.Module, state: list[tuple[str, Any, Any]]) -> None:
    module.__dict__.clear()
    for name, value, content in state:
        if isinstance(value, list):
            value[:] = content
        elif isinstance(value, dict):
            value.clear()
            value.update(content)
        module.__dict__[name] = value
