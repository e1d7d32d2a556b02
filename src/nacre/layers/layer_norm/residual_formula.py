"""LayerNorm of a residual stream r and what dropout leaves of the branch x that is added to it.

Forward, with m_i = 1 where element i of x is kept and 0 where it is dropped, and n, w, b as in formula.py:

    s = r + x m / (1 - p)        y = n(s) w + b

Both are results: where normalisation comes first y goes into the next branch and s is the stream, where it comes last
y is the stream.

Backward, with g = dL/dy, and e = dL/ds of what else reads s: dL/dn(s) leads to s as in formula.py, and s to its terms:

    ds = e + r (h - mean(h) - n mean(h n))        dr = ds        dx = ds m / (1 - p)

The mask follows from the seed, and mean and deviation of a row from s: s is all that is kept beside the seed.
"""

import torch
from torch import Tensor

from nacre.core.random import masked
from nacre.layers.layer_norm import formula


def forward(
    residual: Tensor,
    branch: Tensor,
    seed: Tensor | None,
    p: float,
    normalized_shape: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[tuple[Tensor, Tensor], tuple]:
    # half precision is computed in float32; the sum is rounded once, and what was rounded is normalised
    r, x = (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in (residual, branch))
    s = (r + masked(x, seed, p)).to(residual.dtype)
    y, _ = formula.forward(s, normalized_shape, weight, bias, eps)
    return (y, s), (s, seed, p, normalized_shape, weight, eps)


def backward(grads: tuple[Tensor | None, ...], saved: tuple, needs: list[bool]) -> tuple[Tensor | None, ...]:
    g, e = grads
    s, seed, p, normalized_shape, weight, eps = saved
    grad_sum = grad_weight = grad_bias = None
    if g is not None:
        _, of_norm = formula.forward(s, normalized_shape, weight, None, eps)
        norm_needs = [needs[0] or needs[1], needs[2], needs[3]]
        grad_sum, grad_weight, grad_bias = formula.backward(g, of_norm, norm_needs)
    if e is not None:
        e = e.contiguous()
        grad_sum = e if grad_sum is None else e + grad_sum
    # without dropout the residual's gradient is the branch's too
    of_branch = needs[1] and (seed is not None or not needs[0])
    grad_branch = masked(grad_sum, seed, p) if of_branch and grad_sum is not None else None
    return grad_sum if needs[0] else None, grad_branch, grad_weight, grad_bias
