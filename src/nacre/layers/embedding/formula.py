"""Embedding: token t is looked up as row t of a table.

Forward, for indices x of any shape and a table W of V rows and D columns:

    y[n] = W[x[n]]

Backward, with g = dL/dy. Row v appears in every output whose index is v, so

    dL/dW[v] = sum over n with x[n] = v of g[n]

The padding index has no gradient: its g[n] are left out. Where gradients are scaled by frequency, the sum is divided
by its number of terms, which makes it a mean. A sparse gradient lists the pairs (x[n], g[n]) without summing them.

The sum takes its terms in the order of n, on any number of threads, so that the same bits come out every time.
"""

import torch
from torch import Tensor


def forward(
    weight: Tensor, indices: Tensor, num_embeddings: int, padding_idx: int, scale_grad_by_freq: bool, sparse: bool
) -> tuple[Tensor, tuple]:
    # the options say nothing about the values, only how torch is to differentiate the lookup where it does so itself
    output = torch.embedding(weight, indices, padding_idx, scale_grad_by_freq, sparse)
    return output, (indices, num_embeddings, padding_idx, scale_grad_by_freq, sparse)


def backward(grad: Tensor, saved: tuple, needs: list[bool]) -> Tensor:
    indices, num_embeddings, padding_idx, scale_grad_by_freq, sparse = saved
    tokens, g = indices.reshape(-1), grad.reshape(indices.numel(), grad.shape[-1])
    if sparse:
        return _pairs(tokens, g, num_embeddings, padding_idx)
    if padding_idx >= 0:
        g = g.masked_fill((tokens == padding_idx).unsqueeze(-1), 0)
    # half precision is summed in float32 and rounded once
    total = _sum_by_token(tokens, g.to(torch.promote_types(grad.dtype, torch.float32)), num_embeddings)
    if scale_grad_by_freq:
        count = _sum_by_token(tokens, torch.ones_like(tokens).unsqueeze(-1), num_embeddings)
        total = total / count.clamp(min=1)
    return total.to(grad.dtype)


def _sum_by_token(tokens: Tensor, rows: Tensor, num_embeddings: int) -> Tensor:
    table = rows.new_zeros(num_embeddings, rows.shape[-1])
    # two operations for the same sum: on CPUs index_add goes through the rows in their order while index_put adds with
    # atomic operations in any order; on GPUs index_put sorts the indices, stably, while index_add uses atomics
    if rows.device.type == "cpu":
        return table.index_add(0, tokens, rows)
    return table.index_put((tokens,), rows, accumulate=True)


def _pairs(tokens: Tensor, g: Tensor, num_embeddings: int, padding_idx: int) -> Tensor:
    if padding_idx >= 0:
        kept = tokens != padding_idx
        tokens, g = tokens[kept], g[kept]
    size = (num_embeddings, g.shape[-1])
    # copied, since the result of an operator shares no memory with its arguments
    return torch.sparse_coo_tensor(tokens.long().unsqueeze(0), g, size, check_invariants=False).clone()
