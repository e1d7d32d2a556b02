"""Dropout: every element is kept with probability 1 - p, and what is kept is scaled so that the mean stays.

Forward, with m_i = 1 where element i is kept and 0 where it is dropped:

    y_i = x_i m_i / (1 - p)        E[y_i] = x_i (1 - p) / (1 - p) = x_i

Backward: the mask does not depend on x, so each output depends on its own input alone:

    dx_i = g_i m_i / (1 - p)

As the last step of a residual branch x, beside which the stream r passes through:

    y_i = r_i + x_i m_i / (1 - p)        dr_i = g_i        dx_i = g_i m_i / (1 - p)

The mask follows from the seed (nacre.core.random): the backward computes it again, and the seed is all that is kept.
Without a seed nothing is dropped.
"""

import torch
from torch import Tensor

from nacre.core.random import masked


def forward(input: Tensor, seed: Tensor, p: float) -> tuple[Tensor, tuple]:
    return masked(input, seed, p), (seed, p)


def backward(grad: Tensor, saved: tuple, needs: list[bool]) -> Tensor:
    seed, p = saved
    return masked(grad, seed, p)


def residual_forward(residual: Tensor, branch: Tensor, seed: Tensor | None, p: float) -> tuple[Tensor, tuple]:
    # half precision is computed in float32 and rounded once
    r, x = (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in (residual, branch))
    return (r + masked(x, seed, p)).to(residual.dtype), (seed, p)


def residual_backward(grad: Tensor, saved: tuple, needs: list[bool]) -> Tensor | None:
    seed, p = saved
    return None if seed is None or not needs[0] else masked(grad, seed, p)  # dr, and dx where p = 0, are g itself
