"""Cross entropy: the losses of tokens.py, summed or averaged.

The mean divides the sum of the losses by D: the sum of the weights w_y of the tokens which are not ignored or, where
the target gives probabilities, the number of tokens. A change of one token's loss thus changes the result L by

    dL/dloss = 1 / D for the mean, 1 for the sum, and 0 where the token is ignored

and backward, the gradient of L times this is the token's g, from which tokens.py goes on.
"""

import functools

import torch
from torch import Tensor

from nacre.layers.cross_entropy import tokens
from nacre.layers.cross_entropy.tokens import Target


def forward(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, tuple]:
    dtype = loss_dtype(input, target, weight)
    # half precision is read once, computed in float32 and rounded once
    x = input.to(torch.promote_types(dtype, torch.float32))
    maximum, log_sum = tokens.log_sum_exp(x)
    aim = Target(target, weight, ignore_index, label_smoothing)
    loss = reduce(tokens.losses(x, maximum, log_sum, aim), aim, reduction)
    return loss.to(dtype), (input, target, weight, reduction, ignore_index, label_smoothing, maximum, log_sum)


def backward(grad: Tensor, saved: tuple, needs: list[bool]) -> tuple[Tensor | None, ...]:
    input, target, weight, reduction, ignore_index, label_smoothing, maximum, log_sum = saved
    aim = Target(target, weight, ignore_index, label_smoothing)
    g = token_gradient(grad.to(maximum.dtype), aim, reduction)
    found = tokens.gradients(g, input.to(maximum.dtype), maximum, log_sum, aim, needs)
    pairs = zip(found, (input, target, weight), strict=True)
    return tuple(None if gradient is None else gradient.to(of.dtype).contiguous() for gradient, of in pairs)


def loss_dtype(*given: Tensor | None) -> torch.dtype:
    dtypes = (tensor.dtype for tensor in given if tensor is not None and tensor.is_floating_point())
    return functools.reduce(torch.promote_types, dtypes)


def reduce(losses: Tensor, target: Target, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    return losses.sum() / divisor(target) if reduction == "mean" else losses.sum()


def token_gradient(grad: Tensor, target: Target, reduction: str) -> Tensor:
    g = grad / divisor(target) if reduction == "mean" else grad
    return g if target.gives_probabilities else torch.where(target.ignored, 0, g)


def divisor(target: Target) -> Tensor | int:
    if target.gives_probabilities:
        return target.classes.numel() // target.classes.shape[tokens.class_dim(target.classes)]
    if target.weight is None:
        return (~target.ignored).sum()
    return torch.where(target.ignored, 0, target.class_weights(target.weight)).sum()
