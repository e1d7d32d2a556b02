"""What an operator keeps that only its library knows, so that tensors without values cannot tell."""

import functools
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

_LSTM = "aten::mkldnn_rnn_layer"


def with_workspace(operator: Any, arguments: tuple[Any, ...], result: Any) -> Any:
    """The result of torch's LSTM on a CPU with the memory that oneDNN keeps for its backward; others as they are.

    Its backward has one gradient for both biases, which fake tensors forget when they know a call from before.
    """
    if operator._schema.name == f"{_LSTM}_backward":
        return *result[:4], result[3], *result[5:]
    if operator._schema.name != _LSTM or result[3].numel() or not arguments[-1]:
        return result
    shapes = tuple(tuple(tensor.shape) for tensor in arguments[:7])
    size = _lstm_workspace(shapes, arguments[0].dtype, tuple(map(_frozen, arguments[7:])))
    return *result[:3], torch.empty(size, dtype=result[3].dtype, device=result[3].device)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@functools.lru_cache(maxsize=64)
def _lstm_workspace(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, options: tuple[Any, ...]) -> int:
    """Bytes, as oneDNN says when it runs once on zeros: how it lays them out is its own affair."""
    with _disable_current_modes(), torch.enable_grad():  # else it runs as in evaluation
        zeros = [torch.zeros(shape, dtype=dtype, device="cpu") for shape in shapes]
        return int(torch.ops.aten.mkldnn_rnn_layer(*zeros, *options)[3].numel())
