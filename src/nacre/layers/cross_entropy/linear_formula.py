"""Cross entropy of linear logits z = W x + b, a chunk of rows at a time, so that no more logits than that ever exist.

Forward, for each chunk: its logits, and from them the losses, m and l of tokens.py. The logits are thrown away; x and
the two numbers m and l of each token are kept.

Backward, for each chunk: its logits once more, dz from them, m and l as in tokens.py, and then, as for any linear map,

    dx = W' dz        dW = sum over rows of dz x'        db = sum over rows of dz

Together with the forward this takes 8 FLOPs for each pair of a feature and a logit, where keeping the logits takes 6.

The gradients of the losses' sum or mean L are proportional to one number, dL. So the forward can form them for dL = 1
while it has a chunk's logits, and the backward only multiplies: 6 FLOPs, for which dx, dW and db are kept.

Where W has the shape (C, *D, in_features), z has the shape (rows, C, *D): one distribution for each place in D.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nacre.layers.cross_entropy import formula, tokens
from nacre.layers.cross_entropy.linear_map import add, joined, like, linear_gradients, logits, matrix
from nacre.layers.cross_entropy.tokens import Target

LEAST_ROWS = 256


def forward(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    chunk: int | None,
    formed: list[bool],
) -> tuple[Tensor, tuple]:
    dtype = torch.promote_types(formula.loss_dtype(input, target, weight), torch.float32)
    aim = Target(target, weight, ignore_index, label_smoothing)
    g = row_gradients(input.new_ones((), dtype=dtype), aim, reduction, input, linear_weight)
    by_row: list[tuple[Any, ...]] = []
    sums: list[Tensor | None] = [None, None]
    for x, classes, g_x in chunks(chunk or chunk_rows(input, linear_weight), input, target, g):
        z = logits(x, linear_weight, linear_bias, dtype)
        maximum, log_sum = tokens.log_sum_exp(z)
        aim_x = aim._replace(classes=classes)
        dz, *_ = tokens.gradients(g_x, z, maximum, log_sum, aim_x, [any(formed), False, False])
        dx, *parts = linear_gradients(dz, x, linear_weight, formed)
        by_row.append((tokens.losses(z, maximum, log_sum, aim_x), maximum, log_sum, dx))
        sums = [add(total, part) for total, part in zip(sums, parts, strict=True)]
    losses, maximum, log_sum, dx = (joined(parts) for parts in zip(*by_row, strict=True))
    gradients = like((dx, *sums), (input, linear_weight, linear_bias))
    saved = (input, linear_weight, linear_bias, target, weight, reduction, ignore_index, label_smoothing, chunk, formed)
    kept = (input.new_empty(0) if gradient is None else gradient for gradient in gradients)
    return formula.reduce(losses, aim, reduction), (*saved, maximum, log_sum, *kept)


def backward(grad: Tensor, saved: tuple, needs: list[bool]) -> tuple[Tensor | None, ...]:
    input, linear_weight, linear_bias, target, weight, reduction, ignore_index, label_smoothing, chunk = saved[:9]
    formed, maximum, log_sum, *gradients = saved[9:]
    if are_formed(needs, formed):
        found = [grad * gradient if need else None for gradient, need in zip(gradients, needs[:3], strict=True)]
        return (*found, None, None)
    aim = Target(target, weight, ignore_index, label_smoothing)
    g = row_gradients(grad.to(maximum.dtype), aim, reduction, input, linear_weight)
    rows = chunk or chunk_rows(input, linear_weight)
    token_needs = [any(needs[:3]), *needs[3:]]
    by_row: list[tuple[Tensor | None, ...]] = []
    sums: list[Tensor | None] = [None, None, None]
    for x, classes, m, log_s, g_x in chunks(rows, input, target, maximum, log_sum, g):
        z = logits(x, linear_weight, linear_bias, maximum.dtype)
        dz, dq, dv = tokens.gradients(g_x, z, m, log_s, aim._replace(classes=classes), token_needs)
        dx, dw, db = linear_gradients(dz, x, linear_weight, needs)
        by_row.append((dx, dq))
        sums = [add(total, part) for total, part in zip(sums, (dw, db, dv), strict=True)]
    dx, dq = (joined(parts) for parts in zip(*by_row, strict=True))
    return like((dx, *sums[:2], dq, sums[2]), (input, linear_weight, linear_bias, target, weight))


def are_formed(needs: list[bool], formed: list[bool]) -> bool:
    """Whether the forward formed every gradient that is needed."""
    return any(formed) and all(
        known or not needed for known, needed in zip((*formed, False, False), needs, strict=True)
    )


def row_gradients(grad: Tensor, aim: Target, reduction: str, input: Tensor, linear_weight: Tensor) -> Tensor:
    """g of each token, (rows, *D)."""
    return formula.token_gradient(grad, aim, reduction).expand(input.shape[0], *linear_weight.shape[1:-1])


def chunks(rows: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def chunk_rows(input: Tensor, linear_weight: Tensor) -> int:
    """The rows which have as many logits as the input has elements, so that a chunk needs about the input's memory.

    They are 256 at least, lest the products wait for memory: a chunk reads W and adds to dW, which moves 3 numbers for
    6 FLOPs a row. At 256 rows these are 128 FLOPs a byte in float32, ten times what hides the traffic on a processor.
    """
    return max(LEAST_ROWS, -(-input.numel() // max(1, matrix(linear_weight).shape[0])))
