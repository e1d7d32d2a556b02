"""Dropout: every element is kept with probability 1 - p, and what is kept is scaled so that the mean stays.

Forward, with m_i = 1 where element i is kept and 0 where it is dropped:

    y_i = x_i m_i / (1 - p)        E[y_i] = x_i (1 - p) / (1 - p) = x_i

Backward: the mask does not depend on x, so each output depends on its own input alone:

    dx_i = g_i m_i / (1 - p)

The mask follows from the seed (nacre.core.random): the backward computes it again, and the seed is all that is kept.
"""

from torch import Tensor

from nacre.core.random import keep_mask


def forward(input: Tensor, seed: Tensor, p: float) -> tuple[Tensor, tuple]:
    return masked(input, seed, p), (seed, p)


def backward(grad: Tensor, saved: tuple, needs: list[bool]) -> Tensor:
    seed, p = saved
    return masked(grad, seed, p)


def masked(tensor: Tensor, seed: Tensor, p: float) -> Tensor:
    scale = 1 / (1 - p) if p < 1 else 0.0
    return tensor * keep_mask(seed, tensor.shape, p) * scale
