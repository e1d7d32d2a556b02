"""What PyTorch's dispatcher knows of a call: its schema, who watches it, what autocast does, whose memory is whose."""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._C import (
    _are_functorch_transforms_active,
    _get_tracing_state,
    _is_any_autocast_enabled,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch._C._functorch import is_dead_tensor_wrapper  # type: ignore[attr-defined]
from torch.autograd import forward_ad
from torch.compiler import is_compiling

PLAIN = (torch.Tensor, torch.nn.Parameter)
"""The classes of tensors which leave every operator to torch's dispatcher."""
AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA", "xpu": "AutocastXPU", "mps": "AutocastMPS"}
"""The dispatch key of autocast by device type."""
_ALL_AUTOCAST = functools.reduce(
    lambda keys, name: keys | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)),
    AUTOCAST_KEYS.values(),
    torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined),
)


def parse(schema: str) -> tuple[str, dict[str, str], dict[str, str]]:
    """Name, arguments and returns (name to type) of a schema string."""
    match = re.fullmatch(r"(\w+)\((.*)\) -> \(?(.*?)\)?", schema)
    if match is None:
        raise ValueError(f"an op's schema reads 'name(Type argument, ...) -> (Type output, ...)'; got {schema!r}")
    name, arguments, returns = match.groups()

    def named(part: str) -> dict[str, str]:
        pairs = (item.rsplit(" ", 1) for item in part.split(", "))
        return {label: kind for kind, label in pairs}

    return name, named(arguments), named(returns)


def unobserved(arguments: Sequence[Any]) -> bool:
    """Whether nothing but autograd stands between a call and its kernel.

    No compiler or tracer, no mode, no transform, no autocast, no subclass of a tensor: then the dispatcher, which would
    ask each of them in turn, has nothing to say, and a small call takes half the time without it.
    """
    if (
        is_compiling()
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _is_any_autocast_enabled()
        or _get_tracing_state() is not None
    ):
        return False
    for value in arguments:  # a loop, since a generator takes twice as long
        kind = type(value)
        if kind in PLAIN:
            if is_dead_tensor_wrapper(value):  # what a transform left behind
                return False
        elif isinstance(value, torch.Tensor):
            return False
    return True


def without_autocast() -> Any:
    """Keeps autocast, which has cast an op's arguments already, from the operations inside the op."""
    return torch._C._ExcludeDispatchKeyGuard(_ALL_AUTOCAST)


def made_apart(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, its results made apart from its arguments."""
    return lambda *arguments: apart(function(*arguments), arguments)


def apart(results: Any, arguments: Sequence[Any]) -> Any:
    """The results, each in memory of its own.

    A formula may return one of its arguments or a view of it (the gradient of a sum is the gradient itself); an
    operator may not.
    """
    taken = {argument.untyped_storage()._cdata for argument in arguments if isinstance(argument, torch.Tensor)}
    separate = []
    for result in results if isinstance(results, tuple) else (results,):
        if isinstance(result, torch.Tensor) and result.layout is torch.strided:
            if result.untyped_storage()._cdata in taken:
                result = result.clone()
            taken.add(result.untyped_storage()._cdata)
        separate.append(result)
    return tuple(separate) if isinstance(results, tuple) else separate[0]


def recordable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor; a copy of one made in inference mode where autograd may keep it, which takes no such tensor.

    It is for the inputs which torch's own layer copies as well, so that such a tensor serves there. Elsewhere torch
    raises, and so does nacre.
    """
    if is_compiling() or not torch.is_grad_enabled() or not tensor.is_inference():
        return tensor
    return tensor.clone()
