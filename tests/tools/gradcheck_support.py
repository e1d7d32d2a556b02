"""What the tests of nacre.gradcheck share."""

import torch
from torch import Tensor

from nacre.tools.gradcheck import gradcheck


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def function(forward, backward) -> type[torch.autograd.Function]:
    """A hand-written function: ``forward(*inputs)``, ``backward(grad, *inputs)``."""

    class Handwritten(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            ctx.save_for_backward(*inputs)
            return forward(*inputs)

        @staticmethod
        def backward(ctx, *grads):
            return backward(*grads, *ctx.saved_tensors)

    return Handwritten


def only_failure(report):
    assert not report.problems, report
    assert len(report.failures) == 1, report
    return report.failures[0]


def linear_backward(g, x, weight, bias):
    return g @ weight, g.t() @ x, g.sum(0)


def linear_with(**changed):
    """x W' + b, with the gradients named in ``changed`` computed otherwise from (g, x, weight, bias)."""
    names = ("x", "weight", "bias")

    def backward(*tensors):
        right = linear_backward(*tensors)
        return tuple(changed[name](*tensors) if name in changed else right[k] for k, name in enumerate(names))

    return function(lambda x, weight, bias: x @ weight.t() + bias, backward)


LINEAR = (randn(5, 4), randn(3, 4, seed=1), randn(3, seed=2))


def relu_with_slope(slope):
    return function(torch.relu, lambda g, x: g * torch.where(x == 0, slope, (x > 0).double()))


def problem(*arguments, **options) -> str:
    report = gradcheck(*arguments, **options)
    assert not report.ok and len(report.problems) == 1, report
    assert report.problems[0] in report.summary() and report.problems[0] in str(report)
    return report.problems[0]
