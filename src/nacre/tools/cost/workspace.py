"""What an operator keeps or returns that only its library knows, so that tensors without values cannot tell."""

import functools
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from nacre.tools.cost.stage import fake_tensor

_LSTM = "aten::mkldnn_rnn_layer"
_BAG = "aten::_embedding_bag"
_GROUPED = "aten::_grouped_mm"
_ALIGNED = 16
"""Bytes: its results begin their rows at multiples of so many."""


def with_workspace(operator: Any, arguments: tuple[Any, ...], result: Any) -> Any:
    """The result of torch's LSTM on a CPU with the memory that oneDNN keeps for its backward; others as they are.

    The LSTM's backward has one gradient for both biases, which fake tensors forget when they know a call from before.
    A bag of embeddings counts in a tensor that has one place more than it needs.
    """
    if operator._schema.name == f"{_LSTM}_backward":
        return *result[:4], result[3], *result[5:]
    if operator._schema.name == _BAG and _is_fake(result[1]) and result[1].numel():
        longer = torch.empty(result[1].numel() + 1, dtype=result[1].dtype, device=result[1].device)
        return result[0], longer[:-1], *result[2:]
    if operator._schema.name != _LSTM or result[3].numel() or not arguments[-1]:
        return result
    shapes = tuple(tuple(tensor.shape) for tensor in arguments[:7])
    size = _lstm_workspace(shapes, arguments[0].dtype, tuple(map(_frozen, arguments[7:])))
    return *result[:3], torch.empty(size, dtype=result[3].dtype, device=result[3].device)


def run(operator: Any, arguments: Any, keywords: Any) -> Any:
    """What an operator returns, also where fake tensors know it for one dtype alone: products in groups."""
    if operator._schema.name != _GROUPED or not isinstance(arguments[0], fake_tensor()):
        return operator(*arguments, **keywords)
    left, right, offsets = (*arguments, None)[:3]
    offsets = keywords.get("offs", offsets)
    shape = [left.shape[-2], right.shape[-1]]
    if left.dim() == right.dim():
        shape = [left.shape[0] if left.dim() == 3 else offsets.shape[0], *shape]
    dtype = keywords.get("out_dtype") or left.dtype
    line = -(-shape[-1] * dtype.itemsize // _ALIGNED) * _ALIGNED // dtype.itemsize
    strides = [shape[-2] * line, line, 1][-len(shape) :]
    return torch.empty_strided(shape, strides, dtype=dtype, device=left.device)


def _is_fake(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, fake_tensor()) and tensor.untyped_storage().nbytes() == tensor.nbytes


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@functools.lru_cache(maxsize=64)
def _lstm_workspace(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, options: tuple[Any, ...]) -> int:
    """Bytes, as oneDNN says when it runs once on zeros: how it lays them out is its own affair."""
    with _disable_current_modes(), torch.enable_grad():  # else it runs as in evaluation
        zeros = [torch.zeros(shape, dtype=dtype, device="cpu") for shape in shapes]
        return int(torch.ops.aten.mkldnn_rnn_layer(*zeros, *options)[3].numel())
