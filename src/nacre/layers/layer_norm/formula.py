"""LayerNorm: each row of D values is shifted to mean 0 and scaled to variance 1, then scaled and shifted as learned.

Forward, for one row x of D values (the variance is the biased one, divided by D):

    m = mean(x)        v = mean((x - m)^2)        r = 1 / sqrt(v + eps)
    n = (x - m) r      y = n w + b

Backward, with g = dL/dy and h = g w = dL/dn. Every n_j depends on x_i directly, through m and through r:

    dn_j / dx_i = r (delta_ij - 1/D - n_j n_i / D)

because dm/dx_i = 1/D and dr/dx_i = -r^2 n_i / D. Summed over j this gives three terms:

    dx = r (h - mean(h) - n mean(h n))
    dw = sum over rows of g n
    db = sum over rows of g
"""

import torch
from torch import Tensor


def forward(
    input: Tensor, normalized_shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, tuple]:
    row = tuple(range(-len(normalized_shape), 0))
    # half precision is read once, computed in float32 and rounded once
    x = input.to(torch.promote_types(input.dtype, torch.float32))
    mean = x.mean(row, keepdim=True)
    rstd = ((x - mean).square().mean(row, keepdim=True) + eps).rsqrt()
    y = (x - mean) * rstd
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.to(input.dtype).contiguous(), (input, normalized_shape, weight, mean, rstd)


def backward(grad: Tensor, saved: tuple, needs: list[bool]) -> tuple[Tensor | None, ...]:
    input, normalized_shape, weight, mean, rstd = saved
    row = tuple(range(-len(normalized_shape), 0))
    g = grad.to(mean.dtype)
    n = (input - mean) * rstd
    grad_input = grad_weight = grad_bias = None
    if needs[0]:
        h = g if weight is None else g * weight
        grad_input = rstd * (h - h.mean(row, keepdim=True) - n * (h * n).mean(row, keepdim=True))
        grad_input = grad_input.to(input.dtype).contiguous()
    if needs[1]:
        grad_weight = (g * n).sum_to_size(normalized_shape).to(weight.dtype)
    if needs[2]:
        grad_bias = g.sum_to_size(normalized_shape).to(grad.dtype if weight is None else weight.dtype)
    return grad_input, grad_weight, grad_bias
