"""Softmax: numbers become probabilities that sum to 1, each in proportion to its exponential.

Forward, along one dimension of D values x. Any shift of x leaves the result as it is; shifted by the maximum m, no
exponential overflows and the largest is 1:

    z = x - m        s_i = exp(z_i) / sum_j exp(z_j)        l_i = log s_i = z_i - log(sum_j exp(z_j))

Backward, with g the gradient of the output. Every s_i depends on every x_j, by the Jacobian diag(s) - s s':

    ds_i / dx_j = s_i (delta_ij - s_j)        dx = s (g - sum(g s))        for softmax
    dl_i / dx_j = delta_ij - s_j              dx = g - s sum(g)            for log-softmax, s = exp(l)

The output alone is kept. The maximum is a constant to every derivative, because the result does not depend on it.
"""

import torch
from torch import Tensor


def softmax_forward(input: Tensor, dim: int) -> tuple[Tensor, tuple]:
    e = shifted(input, dim).exp()
    output = (e / e.sum(dim, keepdim=True)).to(input.dtype).contiguous()
    return output, (output, dim)


def softmax_backward(grad: Tensor, saved: tuple, needs: list[bool]) -> Tensor:
    output, dim = saved
    g, s = wide(grad), wide(output)
    return (s * (g - (g * s).sum(dim, keepdim=True))).to(output.dtype).contiguous()


def log_softmax_forward(input: Tensor, dim: int) -> tuple[Tensor, tuple]:
    z = shifted(input, dim)
    output = (z - z.exp().sum(dim, keepdim=True).log()).to(input.dtype).contiguous()
    return output, (output, dim)


def log_softmax_backward(grad: Tensor, saved: tuple, needs: list[bool]) -> Tensor:
    output, dim = saved
    g, s = wide(grad), wide(output).exp()
    return (g - s * g.sum(dim, keepdim=True)).to(output.dtype).contiguous()


def softmax_jacobian(input: Tensor) -> Tensor:
    """diag(s) - s s' of the probabilities s along the last dimension."""
    e = shifted(input, -1).exp()
    s = e / e.sum(-1, keepdim=True)
    return (torch.diag_embed(s) - s.unsqueeze(-1) * s.unsqueeze(-2)).to(input.dtype)


def shifted(input: Tensor, dim: int) -> Tensor:
    x = wide(input)
    return x - x.amax(dim, keepdim=True).detach() if x.numel() else x


def wide(tensor: Tensor) -> Tensor:
    # half precision is read once, computed in float32 and rounded once
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
