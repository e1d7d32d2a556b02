"""Activations: one function of one number, applied to every element; its gradient is g times the derivative.

GELU: x weighted by the probability that a standard normal value lies below it; p is that normal's density:

    P(x) = (1 + erf(x / sqrt(2))) / 2        p(x) = dP/dx = exp(-x^2 / 2) / sqrt(2 pi)
    y = x P(x)                               dy/dx = P(x) + x p(x)

GELU with tanh approximates P by (1 + t) / 2, with t = tanh(u):

    u = sqrt(2 / pi) (x + a x^3)             du/dx = sqrt(2 / pi) (1 + 3 a x^2)        a = 0.044715
    y = x (1 + t) / 2                        dy/dx = (1 + t) / 2 + x (1 - t^2) du/dx / 2

ReLU: the positive part. At 0, where it has no derivative, it counts as 0. The output tells all that backward needs:

    y = max(x, 0)                            dy/dx = 1 where y > 0, else 0

SiLU: x weighted by its sigmoid s:

    y = x s(x)                               dy/dx = s + x s (1 - s) = s (1 + x (1 - s))

Tanh and Sigmoid: their derivatives are functions of the output y itself:

    y = tanh(x)                              dy/dx = 1 - y^2
    y = 1 / (1 + exp(-x))                    dy/dx = exp(-x) y^2 = y (1 - y)

Half precision is read once, computed in float32 and rounded once.
"""

import math

import torch
from torch import Tensor

CUBIC = 0.044715


def gelu_forward(input: Tensor, approximate: str) -> tuple[Tensor, tuple]:
    x = wide(input)
    y = 0.5 * x * (1 + (torch.tanh(tanh_argument(x)) if approximate == "tanh" else torch.erf(x / math.sqrt(2))))
    return y.to(input.dtype), (input, approximate)


def gelu_backward(grad: Tensor, saved: tuple, needs: list[bool]) -> Tensor:
    input, approximate = saved
    g, x = wide(grad), wide(input)
    if approximate == "tanh":
        t = torch.tanh(tanh_argument(x))
        slope = math.sqrt(2 / math.pi) * (1 + 3 * CUBIC * x.square())
        derivative = 0.5 * (1 + t) + 0.5 * x * (1 - t.square()) * slope
    else:
        probability = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        density = torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)
        derivative = probability + x * density
    return (g * derivative).to(input.dtype)


def tanh_argument(x: Tensor) -> Tensor:
    return math.sqrt(2 / math.pi) * x * (1 + CUBIC * x.square())


def relu_forward(input: Tensor) -> tuple[Tensor, tuple]:
    y = torch.where(input <= 0, 0, input)  # so asked, NaN stays NaN
    return y, (y,)


def relu_backward(grad: Tensor, saved: tuple, needs: list[bool]) -> Tensor:
    (y,) = saved
    return torch.where(y <= 0, 0, grad)


def silu_forward(input: Tensor) -> tuple[Tensor, tuple]:
    x = wide(input)
    return (x * torch.sigmoid(x)).to(input.dtype), (input,)


def silu_backward(grad: Tensor, saved: tuple, needs: list[bool]) -> Tensor:
    (input,) = saved
    g, x = wide(grad), wide(input)
    s = torch.sigmoid(x)
    return (g * s * (1 + x * (1 - s))).to(input.dtype)


def tanh_forward(input: Tensor) -> tuple[Tensor, tuple]:
    y = torch.tanh(wide(input)).to(input.dtype)
    return y, (y,)


def tanh_backward(grad: Tensor, saved: tuple, needs: list[bool]) -> Tensor:
    (output,) = saved
    g, y = wide(grad), wide(output)
    return (g * (1 - y.square())).to(output.dtype)


def sigmoid_forward(input: Tensor) -> tuple[Tensor, tuple]:
    y = torch.sigmoid(wide(input)).to(input.dtype)
    return y, (y,)


def sigmoid_backward(grad: Tensor, saved: tuple, needs: list[bool]) -> Tensor:
    (output,) = saved
    g, y = wide(grad), wide(output)
    return (g * y * (1 - y)).to(output.dtype)


def wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
