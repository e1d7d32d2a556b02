"""Cross entropy of linear logits z = W x + b, a chunk of rows at a time, so that no more logits than that ever exist.

Forward, for each chunk: its logits, and from them the losses, m and l of tokens.py. The logits are thrown away; x and
the two numbers m and l of each token are kept.

Backward, for each chunk: its logits once more, dz from them, m and l as in tokens.py, and then, as for any linear map,

    dx = W' dz        dW = sum over rows of dz x'        db = sum over rows of dz

Together with the forward this takes 8 FLOPs for each pair of a feature and a logit, where keeping the logits takes 6.

Where W has the shape (C, *D, in_features), z has the shape (rows, C, *D): one distribution for each place in D.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from nacre.layers.cross_entropy import formula, tokens
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
) -> tuple[Tensor, tuple]:
    dtype = torch.promote_types(formula.loss_dtype(input, target, weight), torch.float32)
    aim = Target(target, weight, ignore_index, label_smoothing)
    parts = []
    for x, classes in chunks(chunk or chunk_rows(input, linear_weight), input, target):
        z = logits(x, linear_weight, linear_bias, dtype)
        maximum, log_sum = tokens.log_sum_exp(z)
        parts.append((tokens.losses(z, maximum, log_sum, aim._replace(classes=classes)), maximum, log_sum))
    losses, maximum, log_sum = (torch.cat(part) for part in zip(*parts, strict=True))
    saved = (input, linear_weight, linear_bias, target, weight, reduction, ignore_index, label_smoothing, chunk)
    return formula.reduce(losses, aim, reduction), (*saved, maximum, log_sum)


def backward(grad: Tensor, saved: tuple, needs: list[bool]) -> tuple[Tensor | None, ...]:
    input, linear_weight, linear_bias, target, weight, reduction, ignore_index, label_smoothing, chunk = saved[:-2]
    maximum, log_sum = saved[-2:]
    aim = Target(target, weight, ignore_index, label_smoothing)
    g = formula.token_gradient(grad.to(maximum.dtype), aim, reduction).expand(maximum.squeeze(1).shape)
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
    dx, dq = (None if parts[0] is None else torch.cat(parts) for parts in zip(*by_row, strict=True))
    found = zip((dx, *sums[:2], dq, sums[2]), (input, linear_weight, linear_bias, target, weight), strict=True)
    return tuple(None if d is None else d.reshape(of.shape).to(of.dtype) for d, of in found)


def linear_gradients(dz: Tensor | None, x: Tensor, linear_weight: Tensor, needs: list[bool]) -> list[Tensor | None]:
    if dz is None:
        return [None, None, None]
    dz = dz.flatten(1)
    # the products run in the dtype of x; what is summed over chunks stays in that of dz
    rounded = dz.to(x.dtype)
    return [
        torch.mm(rounded, matrix(linear_weight)) if needs[0] else None,
        torch.mm(rounded.T, x).to(dz.dtype) if needs[1] else None,
        dz.sum(0) if needs[2] else None,
    ]


def add(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    return part if total is None or part is None else total + part


def logits(x: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    z = torch.mm(x, matrix(linear_weight).T).to(dtype).unflatten(1, linear_weight.shape[:-1])
    return z if linear_bias is None else z + linear_bias


def matrix(linear_weight: Tensor) -> Tensor:
    return linear_weight.flatten(0, -2)


def chunks(rows: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def chunk_rows(input: Tensor, linear_weight: Tensor) -> int:
    """The rows which have as many logits as the input has elements, so that a chunk needs about the input's memory.

    They are 256 at least, lest the products wait for memory: a chunk reads W and adds to dW, which moves 3 numbers for
    6 FLOPs a row. At 256 rows these are 128 FLOPs a byte in float32, ten times what hides the traffic on a processor.
    """
    return max(LEAST_ROWS, -(-input.numel() // max(1, matrix(linear_weight).shape[0])))
