"""Errors about bad input, in one form: the rule, what came, the likely fix."""

import math

import torch


def error(kind: type[Exception], rule: str, got: str, fix: str = "") -> Exception:
    """An exception of type ``kind`` to raise, with a message in nacre's form.

    Args:
        kind: the type that torch.nn raises for the same input.
        rule: what holds for every good input.
        got: what came instead.
        fix: what the caller most likely meant; a sentence, or empty.

    Example:
        >>> error(ValueError, "p is a probability, from 0 to 1", "p = 1.5")
        ValueError('p is a probability, from 0 to 1; got p = 1.5.')
    """
    # two formats: the compiler, which traces errors too, cannot add formatted strings
    return kind(f"{rule}; got {got}. {fix}") if fix else kind(f"{rule}; got {got}.")


def shape(tensor: torch.Tensor) -> str:
    """The shape of a tensor as a plain tuple, for messages."""
    return str(tuple(tensor.shape))


def probability(name: str, p: float) -> None:
    """Raises ValueError unless p lies from 0 to 1; RuntimeError where it is not a number, as torch does."""
    if not 0 <= p <= 1:
        kind = RuntimeError if math.isnan(p) else ValueError
        raise error(kind, f"p of {name} is a probability, from 0 to 1", f"p = {p}")


def same_device(name: str, **tensors: torch.Tensor | None) -> None:
    """Raises RuntimeError unless all tensors lie on one device."""
    devices = [tensor.device for tensor in tensors.values() if tensor is not None]
    if devices.count(devices[0]) < len(devices):
        raise _differ("device", name, tensors)


def same_dtype(name: str, **tensors: torch.Tensor | None) -> None:
    """Raises RuntimeError unless all tensors have one dtype; under autocast, which casts them, it lets them pass."""
    given = [tensor for tensor in tensors.values() if tensor is not None]
    dtypes = [tensor.dtype for tensor in given]
    if dtypes.count(dtypes[0]) < len(dtypes) and not under_autocast(given[0]):
        raise _differ("dtype", name, tensors)


def under_autocast(tensor: torch.Tensor) -> bool:
    """Whether autocast is at work on the tensor's device; never on one that has no autocast, such as ``meta``."""
    device = tensor.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _differ(attribute: str, name: str, tensors: dict[str, torch.Tensor | None]) -> Exception:
    given = {label: getattr(tensor, attribute) for label, tensor in tensors.items() if tensor is not None}
    got = ", ".join(f"{label} of {attribute} {value}" for label, value in given.items())
    fix = f"Convert the others with .to({next(iter(given))}.{attribute})."
    return error(RuntimeError, f"{name} takes tensors of one {attribute}", got, fix)
