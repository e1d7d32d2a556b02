"""The formula as the op ``attention`` calls it: on queries, keys and values, or on one tensor that holds all three.

The projection of self-attention is such a tensor, packed (L, N, 3 H E). Its gradient is one tensor too, laid out as the
projection, so that neither direction copies what the products before and after it make.
"""

import torch
from torch import Tensor

from nacre.layers.attention import formula
from nacre.layers.attention.layout import merge_heads, split_heads


def forward(
    query: Tensor, key: Tensor | None, value: Tensor | None, mask: Tensor | None, *settings
) -> tuple[tuple[Tensor, Tensor], tuple]:
    packed_heads = settings[-1]
    if key is not None and value is not None:
        results, saved = formula.forward(query, key, value, mask, *settings[:-1])
        return results, (*saved[:-2], packed_heads, *saved[-2:])
    (output, weights), saved = formula.forward(*unpacked(query, packed_heads), mask, *settings[:-1])
    output = merge_heads(output).contiguous()
    return (output, weights), (query, None, None, mask, *settings, *saved[-2:])


def backward(grads: tuple[Tensor | None, Tensor | None], saved: tuple, needs: list[bool]) -> tuple[Tensor | None, ...]:
    query, key, value, *settings, packed_heads, maximum, total = saved
    if key is not None:
        return formula.backward(grads, (query, key, value, *settings, maximum, total), needs)
    grad_output = None if grads[0] is None else split_heads(grads[0], packed_heads)
    heads = unpacked(query, packed_heads)
    each = [needs[0]] * 3 + needs[3:]
    *found, dm, dkm = formula.backward((grad_output, grads[1]), (*heads, *settings, maximum, total), each)
    parts = [torch.zeros_like(head) if part is None else part for part, head in zip(found, heads, strict=True)]
    return packed_as(query, parts) if needs[0] else None, None, None, dm, dkm


def unpacked(packed: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """(L, N, 3 H E) to three views (N, H, L, E)."""
    return tuple(split_heads(part, num_heads) for part in packed.chunk(3, -1))


def packed_as(packed: Tensor, parts: list[Tensor]) -> Tensor:
    """Three tensors (N, H, L, E) as one (L, N, 3 H E), in the order in memory of another."""
    joined = torch.cat([merge_heads(part) for part in parts], -1)
    if packed.stride(0) < packed.stride(1):
        return joined.transpose(0, 1).contiguous().transpose(0, 1)
    return joined.contiguous()
