"""Tensors inside nested inputs and outputs: naming them, replacing them, copying them with their strides."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from nacre.core import check


def named_inputs(inputs: tuple, keywords: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors among the inputs: 'input 0', 'input 1[0]', and keywords by their names."""
    for number, value in enumerate(inputs):
        yield from named_tensors(value, f"input {number}")
    for name, value in keywords.items():
        yield from named_tensors(value, name)


def named_tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested tuples, lists, dicts and dataclasses, named by the way to them.

    Example:
        >>> [name for name, _ in named_tensors((torch.ones(1), {"mask": torch.ones(2)}), "output")]
        ['output[0]', "output[1]['mask']"]
    """
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from named_tensors(item, f"{name}[{key!r}]")
    elif isinstance(value, (tuple, list)):
        fields = getattr(value, "_fields", None)
        for number, item in enumerate(value):
            yield from named_tensors(item, f"{name}.{fields[number]}" if fields else f"{name}[{number}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from named_tensors(getattr(value, field.name), f"{name}.{field.name}")


def replace_tensors(value: Any, replacement: Callable[[Tensor], Tensor]) -> Any:
    """The same nested structure with every tensor replaced, in the order of :func:`named_tensors`."""
    if isinstance(value, Tensor):
        return replacement(value)
    if isinstance(value, dict):
        replaced = copy.copy(value)
        replaced.update((key, replace_tensors(item, replacement)) for key, item in value.items())
        return replaced
    if isinstance(value, (tuple, list)):
        items = [replace_tensors(item, replacement) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **replace_tensors(fields, replacement))
    return value


def strided_copy(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A differentiable copy with the strides of ``tensor``; contiguous where entries of it share memory."""
    dtype = tensor.dtype if dtype is None else dtype
    extent = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 0 or (size > 1 and stride < extent):
            return tensor.to(dtype).clone(memory_format=torch.contiguous_format)
        extent += (size - 1) * stride
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=tensor.device).copy_(tensor)


def same_values(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors of one shape hold the same values; NaN equals NaN."""
    return bool(((left == right) | ((left != left) & (right != right))).all())


def largest(tensor: Tensor | None) -> float:
    """The largest absolute value among the finite entries; 0 where there are none."""
    if tensor is None:
        return 0.0
    finite = tensor.detach()[torch.isfinite(tensor)]
    return float(finite.abs().max()) if finite.numel() else 0.0


def distance(left: Tensor, right: Tensor) -> float:
    """The largest difference of two tensors of one shape; equal infinities do not differ, NaN differs infinitely."""
    difference = torch.where(left == right, 0.0, left - right).detach().abs()
    return float(difference.nan_to_num(nan=torch.inf).max()) if difference.numel() else 0.0


def refuse_unsupported(name: str, tensor: Tensor) -> None:
    """Raises TypeError for a tensor whose entries cannot be moved one by one along the real line."""
    if tensor.is_complex():
        raise check.error(
            TypeError,
            "nacre.gradcheck compares real derivatives",
            f"{name} of dtype {tensor.dtype}",
            "Check a function of torch.view_as_real(...) instead.",
        )
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise check.error(
            TypeError,
            "nacre.gradcheck moves the entries of dense tensors",
            f"{name}, a nested tensor" if tensor.is_nested else f"{name} of layout {tensor.layout}",
            "Check a function which takes the values and builds that tensor inside.",
        )
