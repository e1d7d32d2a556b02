"""Attention: each of L queries takes a mean of the S values, weighted by how well their keys agree with the query.

Forward, for the queries Q (L, E), keys K (S, E) and values V (S, E_v) of a head, and a scale c:

    A = c Q K' + M             M is the sum of the masks that are numbers; A = -inf where another mask says no
    m_i = max_j A_ij           t_i = sum_j exp(A_ij - m_i)          P_ij = exp(A_ij - m_i) / t_i
    W = D o P                  dropout: D_ij is 0 with probability p, else 1 / (1 - p)
    O = W V

Backward, with G = dL/dO and, where the weights are a result too, H = dL/dW:

    dV = W' G          dW = G V' + H          dP = D o dW

P is computed again from m and t, so that no matrix of L x S values is kept. The two stay apart: one number m + log t
would be rounded to 1e-3 of P where scores are about 1e4. With dP_ij / dA_ik = P_ij (delta_jk - P_ik):

    dA = P o (dP - r)          r_i = sum_j P_ij dP_ij
    dQ = c dA K                dK = c dA' Q                dM = dA

Where the mean of the weights over the heads is returned, H is its gradient divided by their number, in each head.

(Without H, r_i is also sum_e G_ie O_ie: shorter, but as exact as O was rounded, and O would have to be kept.) What was
repeated, along a dimension or for a group of query heads, sums the gradients of its copies.

A row whose every key is masked has no mean. Its output is 0: with m = 0 and t = 1, P = exp(-inf) = 0. Where the weights
are a result, weights and output are NaN, as 0 / 0 is.
"""

import functools

import torch
from torch import Tensor

from nacre.core.random import keep_mask
from nacre.layers.attention.layout import gathered, operands, ordered_as


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    key_mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    enable_gqa: bool,
    need_weights: bool,
    average_weights: bool,
) -> tuple[tuple[Tensor, Tensor], tuple]:
    q, k, v = operands(query, key, value, enable_gqa)
    scores = masked_scores(q, k, mask, key_mask, is_causal, scale)
    maximum, total = row_statistics(scores, need_weights)
    probabilities = (scores - maximum).exp() / total
    weights = probabilities if seed is None else probabilities * dropout(seed, probabilities, dropout_p)
    output = ordered_as(query, (weights @ v).to(query.dtype))
    returned = weights.mean(-3) if average_weights else weights
    returned = returned.to(query.dtype) if need_weights else query.new_empty(0)
    settings = (seed, dropout_p, is_causal, scale, enable_gqa, need_weights, average_weights)
    return (output, returned), (query, key, value, mask, key_mask, *settings, maximum, total)


def backward(grads: tuple[Tensor | None, Tensor | None], saved: tuple, needs: list[bool]) -> tuple[Tensor | None, ...]:
    query, key, value, mask, key_mask, seed, *settings, maximum, total = saved
    dropout_p, is_causal, scale, enable_gqa, _, average_weights = settings
    needs_query, needs_key, needs_value, needs_mask, needs_key_mask = needs
    q, k, v = operands(query, key, value, enable_gqa)
    g, h = (None if grad is None else grad.to(q.dtype) for grad in grads)
    if average_weights and h is not None:
        h = (h / q.shape[-3]).unsqueeze(-3)
    p = (masked_scores(q, k, mask, key_mask, is_causal, scale) - maximum).exp() / total
    d = None if seed is None else dropout(seed, p, dropout_p)
    w = p if d is None else p * d
    dq = dk = dv = dm = dkm = None
    if needs_value and g is not None:
        dv = ordered_as(value, gathered(w.mT @ g, value, enable_gqa))
    if needs_query or needs_key or needs_mask or needs_key_mask:
        da = score_gradient(g, h, p, d, v)
        dq = ordered_as(query, gathered(da @ k * scale, query)) if needs_query else None
        dk = ordered_as(key, gathered(da.mT @ q * scale, key, enable_gqa)) if needs_key else None
        dm = gathered(da, mask) if needs_mask else None
        dkm = gathered(da, key_mask) if needs_key_mask else None
    return dq, dk, dv, dm, dkm


def score_gradient(g: Tensor | None, h: Tensor | None, p: Tensor, d: Tensor | None, v: Tensor) -> Tensor:
    """dA, from the gradients that arrive at the output and at the weights; one of them may be missing."""
    from_output = None if g is None else (g @ v.mT).sum_to_size(p.shape)
    dw = functools.reduce(torch.add, (part for part in (from_output, h) if part is not None))
    dp = dw if d is None else dw * d
    return p * (dp - (p * dp).sum(-1, True))


def masked_scores(
    q: Tensor, k: Tensor, mask: Tensor | None, key_mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    scores = (q * scale) @ k.mT
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    for item in (mask, key_mask):
        if item is not None:
            scores = torch.where(item, scores, -torch.inf) if item.dtype is torch.bool else scores + item
    return scores


def row_statistics(scores: Tensor, need_weights: bool) -> tuple[Tensor, Tensor]:
    """m and t."""
    maximum = scores.amax(-1, True) if scores.shape[-1] else scores.new_zeros((*scores.shape[:-1], 1))
    if need_weights:
        return maximum, (scores - maximum).exp().sum(-1, True)
    maximum = maximum.masked_fill(maximum == -torch.inf, 0.0)
    total = (scores - maximum).exp().sum(-1, True)
    return maximum, total.masked_fill(total == 0, 1.0)


def dropout(seed: Tensor, like: Tensor, p: float) -> Tensor:
    """D."""
    return keep_mask(seed, like.shape, p).to(like.dtype) * (1 / (1 - p) if p < 1 else 0.0)
