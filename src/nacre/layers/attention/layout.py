"""What attention does to its tensors besides mathematics: dtypes, heads that share keys and values, order in memory."""

from collections.abc import Callable

import torch
from torch import Tensor


def operands(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Half precision in float32; keys and values repeated for the query heads that share them."""
    q, k, v = (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in (query, key, value))
    if enable_gqa:
        k, v = (tensor.repeat_interleave(q.shape[-3] // tensor.shape[-3], -3) for tensor in (k, v))
    return q, k, v


def gathered(gradient: Tensor, of: Tensor, enable_gqa: bool = False) -> Tensor:
    """The gradient summed over the copies that :func:`operands` and broadcasting made of a tensor, in its dtype."""
    if enable_gqa:
        heads = of.shape[-3]
        gradient = gradient.unflatten(-3, (heads, gradient.shape[-3] // heads)).sum(-3)
    return gradient.sum_to_size(of.shape).to(of.dtype, copy=True)  # a copy: two masks may have the same gradient


def ordered_as(query: Tensor, output: Tensor) -> Tensor:
    """The output with its dimensions in the query's order in memory, as torch's fused kernels lay it out.

    Where the heads were split off by a view, no copy is then needed to merge them again.
    """
    if output.dim() != 4 or output.shape != query.shape or query.stride(3) != 1 or 0 in query.stride():
        return output
    order = [*sorted(range(3), key=query.stride, reverse=True), 3]
    return output.permute(order).contiguous().permute([order.index(dimension) for dimension in range(4)])


def split_heads(rows: Tensor, num_heads: int) -> Tensor:
    """(L, N, H E) to (N, H, L, E), a view."""
    return rows.unflatten(-1, (num_heads, rows.shape[-1] // num_heads)).permute(1, 2, 0, 3)


def merge_heads(heads: Tensor) -> Tensor:
    """(N, H, L, E) to (L, N, H E), a view where the heads lie together in memory."""
    return heads.permute(2, 0, 1, 3).flatten(-2)


def each_once(
    function: Callable[[Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The function of the three tensors; those that were one tensor stay one."""
    q = function(query)
    k = q if key is query else function(key)
    v = k if value is key else q if value is query else function(value)
    return q, k, v
