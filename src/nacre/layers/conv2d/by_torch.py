"""Torch's own convolution, oneDNN's where torch takes it, in the form of the op: another padding on each side."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad


def forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    excess, both = _split(padding)
    padded = pad(input, excess) if any(excess) else input
    return torch.ops.aten.convolution(padded, weight, bias, stride, both, dilation, False, [0, 0], groups)


def backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    excess, both = _split(padding)
    padded = pad(input, excess) if any(excess) else input
    numbers = (weight.shape[:1], stride, both, dilation, False, [0, 0], groups, needs)
    grad_input, *others = torch.ops.aten.convolution_backward(grad, padded, weight, *numbers)
    if needs[0] and any(excess):
        left, _, top, _ = excess
        rows, columns = input.shape[2:]
        inner = grad_input[..., top : top + rows, left : left + columns]
        like = torch._prims_common.suggest_memory_format(grad_input)
        grad_input = inner.contiguous(memory_format=like)
    return grad_input, *others


def _split(padding: Sequence[int]) -> tuple[list[int], list[int]]:
    """What each side has beyond the opposite one, and what both have: torch's convolution takes the latter only."""
    left, right, top, bottom = padding
    across, down = min(left, right), min(top, bottom)
    return [left - across, right - across, top - down, bottom - down], [down, across]
