"""Cross entropy of one token: how much the target surprises the distribution that logits give to C classes, in nats.

Forward, for logits x, a class index y or probabilities q, class weights w and label smoothing s:

    m = max_c x_c        l = log(sum_c exp(x_c - m))        log p_c = x_c - m - l
    t_c = (1 - s) q_c + s / C,   where a class index y means q_c = 1 for c = y and 0 otherwise
    loss = - sum_c w_c t_c log p_c,   and 0 where y is ignored

m and l are kept apart: in their sum a large m would round l away.

Backward, with g = dL/dloss. m is a constant, for shifting every logit changes nothing, and

    d log p_c / dx_k = delta_ck - p_k

Summed over c, softmax minus target; probabilities and the weights beside them have gradients too:

    dx_k = g (p_k sum_c w_c t_c - w_k t_k)
    dq_c = - g (1 - s) w_c log p_c
    dw_c = - sum over tokens of g t_c log p_c

Classes lie in dimension 1 of x, or in its only one; every other dimension counts tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Target(NamedTuple):
    classes: Tensor  # y where integer, q where floating point
    weight: Tensor | None
    ignore_index: int
    label_smoothing: float

    @property
    def gives_probabilities(self) -> bool:
        return self.classes.is_floating_point()

    @property
    def ignored(self) -> Tensor:
        return self.classes == self.ignore_index

    @property
    def valid_classes(self) -> Tensor:
        return self.classes.masked_fill(self.ignored, 0)

    def distribution(self, x: Tensor) -> Tensor:
        """t"""
        dim, s = class_dim(x), self.label_smoothing
        if self.gives_probabilities:
            q = self.classes.to(x.dtype)
        else:
            q = torch.zeros_like(x).scatter(dim, self.valid_classes.unsqueeze(dim), 1.0)
        return (1 - s) * q + s / x.shape[dim] if s > 0 else q

    def class_weights(self, weight: Tensor) -> Tensor:
        """w_y, the index as a row: the value of a single one would have to be known."""
        return weight[self.valid_classes.flatten()].view(self.classes.shape)

    def weigh(self, values: Tensor) -> Tensor:
        return values if self.weight is None else values * by_class(self.weight, values)


def class_dim(x: Tensor) -> int:
    return 1 if x.dim() > 1 else 0


def by_class(weight: Tensor, x: Tensor) -> Tensor:
    return weight.to(x.dtype).view(-1, *(1,) * (x.dim() - 2))


def log_sum_exp(x: Tensor) -> tuple[Tensor, Tensor]:
    maximum = x.detach().amax(class_dim(x), keepdim=True)
    return maximum, (x - maximum).exp().sum(class_dim(x), keepdim=True).log()


def losses(x: Tensor, maximum: Tensor, log_sum: Tensor, target: Target) -> Tensor:
    dim, s = class_dim(x), target.label_smoothing
    if target.gives_probabilities:
        return -(target.weigh(target.distribution(x)) * (x - maximum - log_sum)).sum(dim)
    # one logit a token: the others may be -inf, and 0 times it is not 0
    log_p = (x.gather(dim, target.valid_classes.unsqueeze(dim)) - maximum - log_sum).squeeze(dim)
    loss = -(1 - s) * (log_p if target.weight is None else log_p * target.class_weights(target.weight))
    if s > 0:
        loss = loss - target.weigh(x - maximum - log_sum).sum(dim) * (s / x.shape[dim])
    return loss.masked_fill(target.ignored, 0)


def gradients(
    g: Tensor, x: Tensor, maximum: Tensor, log_sum: Tensor, target: Target, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dim = class_dim(x)
    g = g.unsqueeze(dim) if g.dim() > 0 else g
    log_p = x - maximum - log_sum
    grad_input = grad_classes = grad_weight = None
    if needs[0]:
        wt = target.weigh(target.distribution(x))
        grad_input = g * (log_p.exp() * wt.sum(dim, keepdim=True) - wt)
    if needs[1]:
        grad_classes = -g * (1 - target.label_smoothing) * target.weigh(log_p)
    if needs[2] and target.weight is not None:
        per_class = by_class(target.weight, x)
        grad_weight = -(g * target.distribution(x) * log_p).sum_to_size(per_class.shape).flatten()
    return grad_input, grad_classes, grad_weight
