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
    padded, _, both = _padded(input, padding)
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
    padded, excess, both = _padded(input, padding)
    numbers = (weight.shape[:1], stride, both, dilation, False, [0, 0], groups, needs)
    found = torch.ops.aten.convolution_backward(grad, padded, weight, *numbers)
    # oneDNN gives the gradients of weight and bias where one of them is asked for
    grad_input, *others = (gradient if needed else None for gradient, needed in zip(found, needs, strict=True))
    if grad_input is not None and any(excess):
        left, _, top, _ = excess
        rows, columns = input.shape[2:]
        inner = grad_input[..., top : top + rows, left : left + columns]
        like = torch._prims_common.suggest_memory_format(grad_input)
        grad_input = inner.contiguous(memory_format=like)
    return grad_input, *others


def _padded(input: Tensor, padding: Sequence[int]) -> tuple[Tensor, list[int], list[int]]:
    """The input padded by what each side has beyond the opposite one; that; and what both have, for torch to pad."""
    left, right, top, bottom = padding
    across, down = min(left, right), min(top, bottom)
    excess = [left - across, right - across, top - down, bottom - down]
    return pad(input, excess) if any(excess) else input, excess, [down, across]
