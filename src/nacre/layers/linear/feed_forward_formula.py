"""Feed-forward: two linear maps with an activation f between them, and dropout on what it gives.

Forward, for rows x (D), with m_i = 1 where hidden feature i is kept and 0 where it is dropped:

    h = x W1' + b1        a = f(h) m / (1 - p)        y = a W2' + b2

Backward, with g = dL/dy, and Linear's derivatives (formula.py) around the activation's:

    da = g W2             dW2 = g' a                  db2 = sum over rows of g
    dh = da f'(h) m / (1 - p)
    dx = dh W1            dW1 = dh' x                 db1 = sum over rows of dh

Only x and h are kept: a follows from h and from the seed of the mask, and is computed again. The activations, with P
the probability that a standard normal value lies below h, p its density, t = tanh(u) and s = sigmoid(h):

    gelu         f = h P              f' = P + h p
    gelu_tanh    f = h (1 + t) / 2    f' = (1 + t) / 2 + h (1 - t^2) du/dh / 2     u = sqrt(2 / pi) (h + 0.044715 h^3)
    relu         f = max(h, 0)        f' = 1 where h > 0, else 0
    silu         f = h s              f' = s (1 + h (1 - s))
"""

import math

import torch
from torch import Tensor

from nacre.core.random import masked
from nacre.layers.linear import formula


def forward(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: str,
    seed: Tensor | None,
    p: float,
) -> tuple[Tensor, tuple]:
    hidden, _ = formula.forward(input, weight1, bias1)
    y, _ = formula.forward(activated(hidden, activation, seed, p), weight2, bias2)
    return y, (input, weight1, bias1, weight2, activation, seed, p, hidden)


def backward(grad: Tensor, saved: tuple, needs: list[bool]) -> tuple[Tensor | None, ...]:
    input, weight1, _, weight2, activation, seed, p, hidden = saved
    of_hidden = any(needs[:3])
    a = activated(hidden, activation, seed, p)
    da, grad_weight2, grad_bias2 = formula.backward(grad, (a, weight2), [of_hidden, *needs[3:]])
    if da is None:
        return None, None, None, grad_weight2, grad_bias2
    dh = masked(da, seed, p) * slope(hidden, activation)
    return *formula.backward(dh, (input, weight1), needs[:3]), grad_weight2, grad_bias2


def activated(hidden: Tensor, activation: str, seed: Tensor | None, p: float) -> Tensor:
    return masked(value(hidden, activation), seed, p)


def value(h: Tensor, activation: str) -> Tensor:
    if activation == "gelu":
        return 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
    if activation == "gelu_tanh":
        return 0.5 * h * (1 + torch.tanh(tanh_argument(h)))
    if activation == "silu":
        return h * torch.sigmoid(h)
    return torch.where(h <= 0, 0, h)  # so asked, NaN stays NaN


def slope(h: Tensor, activation: str) -> Tensor:
    if activation == "gelu":
        density = torch.exp(-0.5 * h.square()) / math.sqrt(2 * math.pi)
        return 0.5 * (1 + torch.erf(h / math.sqrt(2))) + h * density
    if activation == "gelu_tanh":
        t = torch.tanh(tanh_argument(h))
        du = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * h.square())
        return 0.5 * (1 + t) + 0.5 * h * (1 - t.square()) * du
    if activation == "silu":
        s = torch.sigmoid(h)
        return s * (1 + h * (1 - s))
    return torch.where(h <= 0, 0.0, 1.0).to(h.dtype)


def tanh_argument(h: Tensor) -> Tensor:
    return math.sqrt(2 / math.pi) * h * (1 + 0.044715 * h.square())
