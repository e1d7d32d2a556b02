"""nacre.gradcheck: right gradients pass, every mistake is found and named, and nothing of the user's is touched."""

import pytest
import torch
from torch import nn

from nacre.tools.gradcheck import gradcheck
from tests.tools.gradcheck_support import (
    LINEAR,
    function,
    linear_with,
    only_failure,
    randn,
    relu_with_slope,
)

F = nn.functional


# ---------------------------------------------------------------------------------------------- right gradients pass


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x, *, mask=None):
        return self.attention(x, x, x, attn_mask=mask)


RIGHT = {
    "linear": (lambda: nn.Linear(3, 2), lambda: (randn(4, 3),)),
    "bilinear": (lambda: nn.Bilinear(2, 3, 2), lambda: (randn(4, 2), randn(4, 3, seed=1))),
    "conv2d": (lambda: nn.Conv2d(2, 4, 3, padding=1, stride=2, groups=2), lambda: (randn(1, 2, 5, 4),)),
    "conv_transpose": (lambda: nn.ConvTranspose1d(2, 3, 3), lambda: (randn(1, 2, 4),)),
    "layer_norm": (lambda: nn.LayerNorm(5), lambda: (randn(3, 5),)),
    "batch_norm, training": (lambda: nn.BatchNorm1d(3), lambda: (randn(5, 3),)),
    "batch_norm, evaluation": (lambda: nn.BatchNorm1d(3).eval(), lambda: (randn(5, 3),)),
    "lstm": (lambda: nn.LSTM(2, 3), lambda: (randn(4, 1, 2), (randn(1, 1, 3), randn(1, 1, 3, seed=1)))),
    "gru": (lambda: nn.GRU(2, 3, bidirectional=True), lambda: (randn(3, 1, 2),)),
    "embedding": (lambda: nn.Embedding(5, 3), lambda: (torch.tensor([[0, 1], [1, 4]]),)),
    "attention": (Attention, lambda: (randn(1, 3, 4),)),
    "dropout": (lambda: nn.Dropout(0.5), lambda: (randn(20),)),
    "gelu": (nn.GELU, lambda: (randn(10),)),
    "softmax": (lambda: lambda x: x.softmax(-1), lambda: (randn(3, 4),)),
    "cross_entropy": (nn.CrossEntropyLoss, lambda: (randn(3, 4), torch.tensor([0, 3, 2]))),
    "norm": (lambda: torch.linalg.vector_norm, lambda: (randn(6),)),
    "inverse": (lambda: torch.linalg.inv, lambda: (randn(3, 3),)),
    "scalar": (lambda: torch.sin, lambda: (randn(),)),
    "broadcast": (lambda: torch.mul, lambda: (randn(3, 1, 2), randn(4, 1, seed=1))),
    "large values": (lambda: lambda x: (x * 1e3).sin() * 1e9, lambda: (randn(4) * 1e-3,)),
    "small values": (lambda: lambda x: x.sin() * 1e-8, lambda: (randn(4),)),
    "fast wave": (lambda: lambda x: (300 * x).sin(), lambda: (randn(5),)),
    "steep": (lambda: lambda x: (-1e4 * x * x).exp(), lambda: (randn(5) * 0.01,)),
    "shift that cancels": (lambda: lambda x: (x - x.mean()).sum(), lambda: (randn(6),)),
    "probabilities that sum to 1": (lambda: lambda x: x.softmax(-1).sum(-1), lambda: (randn(3, 6),)),
    "far from 0": (lambda: lambda x: x.log(), lambda: (randn(5).abs() * 1e9 + 1e6,)),
    "near the edge of the domain": (lambda: torch.log, lambda: (torch.tensor([1e-3, 1e-2, 1.0]),)),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_right_gradients_pass(name):
    make, inputs = RIGHT[name]
    report = gradcheck(make(), *inputs())
    assert report, report


def test_second_order_of_right_gradients_passes():
    for layer, x in ((nn.Linear(3, 2), randn(2, 3)), (nn.LayerNorm(3), randn(2, 3)), (torch.tanh, randn(3))):
        report = gradcheck(layer, x, second_order=True)
        assert report, report
        assert {result.order for result in report.results} == {1, 2}
        assert "second order too" in report.summary()


def test_a_gradient_that_is_the_incoming_one_itself():
    # it shares memory with the tensor that finite differences move
    assert gradcheck(lambda x: x.view(-1), randn(2, 3), second_order=True)


def test_an_output_that_is_a_parameter_itself():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(randn(3))

        def forward(self):
            return self.weight

    assert gradcheck(Table())


# --------------------------------------------------------------------------------------- verdicts of torch's gradcheck


def wrong_by(factor):
    return function(lambda x: x * x, lambda g, x: factor * 2 * x * g).apply


VERDICTS = {
    "sin": (torch.sin, (randn(4),)),
    "prod": (torch.prod, (randn(4),)),
    "logsumexp": (lambda x: x.logsumexp(0), (randn(4, 2),)),
    "matmul": (torch.matmul, (randn(2, 3), randn(3, 2, seed=1))),
    "cumsum, two outputs": (lambda x: (x.cumsum(0), x.sum()), (randn(4),)),
    "sort": (lambda x: x.sort().values, (randn(6),)),
    "relu away from 0": (torch.relu, (randn(5),)),
    "max pooling": (lambda x: F.max_pool1d(x, 2), (randn(1, 1, 6),)),
    "interpolation": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), (randn(1, 1, 3, 3),)),
    "eigenvalues": (lambda x: torch.linalg.eigvalsh(x @ x.T), (randn(3, 3),)),
    "gather": (lambda x: x.gather(0, torch.tensor([[0, 0, 1]])), (randn(2, 3),)),
    "where": (lambda x: torch.where(x > 0, x, 2 * x), (randn(6),)),
    "jump at the point": (torch.sign, (torch.zeros(1, dtype=torch.float64),)),
    "straight-through rounding": (function(torch.round, lambda g, x: g).apply, (randn(4),)),
    "detached part": (lambda x: x * x.detach(), (randn(4),)),
    "twice too large": (wrong_by(2), (randn(4),)),
    "right by hand": (wrong_by(1), (randn(4),)),
    "1 percent too large": (wrong_by(1.01), (randn(4),)),
    "ignores the incoming gradient": (function(torch.sin, lambda g, x: x.cos()).apply, (randn(4),)),
    "one entry wrong": (function(torch.sin, lambda g, x: g * x.cos() * (1 + (x == x.max()))).apply, (randn(9),)),
    "missing": (function(torch.mul, lambda g, x, y: (g * y, None)).apply, (randn(3), randn(3, seed=1))),
    "wrong shape": (function(torch.sin, lambda g, x: (g * x.cos())[:2]).apply, (randn(3),)),
    "random": (lambda x: x * torch.randint(1, 10**6, ()) if draw_anew() else x, (randn(3),)),
}


def draw_anew() -> bool:
    torch.seed()  # a new state: restoring the generator does not help
    return True


@pytest.mark.parametrize("name", VERDICTS)
def test_verdict_is_that_of_torch(name):
    called, inputs = VERDICTS[name]
    try:
        wanted = torch.autograd.gradcheck(called, tuple(x.clone().requires_grad_() for x in inputs))
    except RuntimeError:  # a GradcheckError, or what the function raised
        wanted = False
    report = gradcheck(called, *inputs)
    assert bool(report) == wanted, report


@pytest.mark.parametrize("name", ["sin", "matmul", "logsumexp", "right by hand", "missing"])
def test_second_order_verdict_is_that_of_torch(name):
    called, inputs = VERDICTS[name]
    asking = tuple(x.clone().requires_grad_() for x in inputs)
    wanted = torch.autograd.gradgradcheck(called, asking, raise_exception=False)
    report = gradcheck(called, *inputs, second_order=True)
    assert all(result.ok for result in report.results if result.order == 2) == wanted, report


def test_errors_that_torch_does_not_see_are_found():
    # with one-hot incoming gradients, as torch's, g^2 is g
    assert not gradcheck(function(torch.sin, lambda g, x: g * g * x.cos()), randn(4))
    # torch.autograd.gradcheck allows 1e-3 of the value plus 1e-5
    assert not gradcheck(wrong_by(1 + 1e-5), randn(4))
    assert not gradcheck(lambda x: wrong_by(2)(x) * 1e-6, randn(4))


# ------------------------------------------------------------------------------------------------- planted mistakes


def norm(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def norm_without_mean(g, x):
    scale = (x.var(-1, correction=0, keepdim=True) + 1e-5).rsqrt()
    return scale * (g - norm(x) * (g * norm(x)).mean(-1, keepdim=True))


def convolution(flipped):
    def backward(g, x, weight):
        grad_x = nn.grad.conv2d_input(x.shape, weight, g)
        grad_weight = nn.grad.conv2d_weight(x, weight.shape, g)
        return grad_x, grad_weight.flip(2, 3) if flipped else grad_weight

    return function(F.conv2d, backward)


SQUARE = (randn(5, 4), randn(4, 4, seed=1), randn(4, seed=2))
ROWS = randn(5, 4)

MISTAKES = {
    "None": (linear_with(bias=lambda *t: None), LINEAR, "input 2", "missing: the backward returns None"),
    "zeros": (linear_with(x=lambda g, x, w, b: torch.zeros_like(x)), LINEAR, "input 0", "missing: the backward gives"),
    "detached": (lambda x, y: x * y.detach(), (ROWS, ROWS + 1), "input 1", "missing: the backward returns None"),
    "factor 2": (linear_with(weight=lambda g, x, w, b: 2 * g.t() @ x), LINEAR, "input 1", "off by a factor of 2.0"),
    "factor 1/3": (linear_with(x=lambda g, x, w, b: g @ w / 7.5), LINEAR, "input 0", "off by a factor of 0.133333"),
    "sign": (linear_with(bias=lambda g, x, w, b: -g.sum(0)), LINEAR, "input 2", "the sign is flipped"),
    "mean for sum": (
        linear_with(bias=lambda g, x, w, b: g.mean(0)), LINEAR, "input 2",
        "off by a factor of 1/5, the size of dimension 0 of the output: a mean where a sum belongs",
    ),
    "sum for mean": (
        function(lambda x: x.mean(1), lambda g, x: g[:, None].expand_as(x)), (ROWS,), "input 0",
        "off by a factor of 4.0, the size of dimension 1 of the tensor: a sum where a mean belongs",
    ),
    "transposed, square": (linear_with(weight=lambda g, x, w, b: x.t() @ g), SQUARE, "input 1", "transposed"),
    "transposed, reshaped": (
        linear_with(weight=lambda g, x, w, b: (x.t() @ g).reshape(3, 4)), LINEAR, "input 1",
        "transposed: the values of the transpose, laid out in this shape",
    ),
    "dimensions transposed": (
        function(torch.sin, lambda g, x: (g * x.cos()).transpose(1, 2)), (randn(2, 3, 3),), "input 0",
        "dimensions 1 and 2 are transposed",
    ),
    "kernel not flipped": (
        convolution(True), (randn(2, 2, 5, 6), randn(3, 2, 3, 3, seed=1)), "input 1", "reversed along dimensions 2, 3",
    ),
    "mean forgotten": (function(norm, norm_without_mean), (ROWS,), "input 0", "the same all along dimension 1: a mean"),
    "scale forgotten": (
        function(lambda x, w: x * w, lambda g, x, w: (g, (g * x).sum(0))), (ROWS, randn(4, seed=1)), "input 0",
        "off by a factor that is the same all along dimension 0: a scale forgotten",
    ),
    "first row only": (
        linear_with(bias=lambda g, x, w, b: g[0]), LINEAR, "input 2",
        "not summed over dimension 0 of the output: only its slice 0 contributes",
    ),
    "last row only": (
        linear_with(bias=lambda g, x, w, b: g[-1]), LINEAR, "input 2",
        "not summed over dimension 0 of the output: only its slice 4 contributes",
    ),
    "part lost": (
        function(torch.sin, lambda g, x: g * x.cos() * (x > 0)), (ROWS,), "input 0", "a part of the gradient is lost"
    ),
    "nan": (function(torch.sin, lambda g, x: g * x.cos() / (x > 0)), (ROWS,), "input 0", "is not finite"),
    "rounding": (function(torch.round, lambda g, x: g), (ROWS,), "input 0", "does not change in small steps"),
    "edge of the domain": (
        function(torch.sqrt, lambda g, x: g), (torch.zeros(1, dtype=torch.float64),), "input 0", "edge of its domain"
    ),
    "jump": (torch.sign, (torch.zeros(1, dtype=torch.float64),), "input 0", "does not settle as its step shrinks"),
    "no pattern": (function(torch.sin, lambda g, x: g * x.cos() + g**3), (ROWS,), "input 0", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found_and_named(name):
    called, inputs, tensor, hint = MISTAKES[name]
    failure = only_failure(gradcheck(called, *inputs))
    assert failure.name == tensor
    assert hint in failure.hint and bool(hint) == bool(failure.hint), failure.hint


def test_a_right_convolution_by_hand_passes():
    assert gradcheck(convolution(False), randn(2, 2, 5, 6), randn(3, 2, 3, 3, seed=1))


def test_two_swapped_gradients():
    swapped = function(torch.mul, lambda g, x, y: (g * x, g * y))
    report = gradcheck(swapped, randn(4), randn(4, seed=1))
    assert [failure.hint for failure in report.failures] == [
        "the gradients of input 0 and input 1 are swapped",
        "the gradients of input 1 and input 0 are swapped",
    ]


def test_a_failure_tells_where_and_by_how_much():
    def one_entry_wrong(g, x):
        gradient = g * x.cos()
        gradient[1, 2] += 0.25
        return gradient

    x = randn(3, 4)
    failure = only_failure(gradcheck(function(torch.sin, one_entry_wrong), x))
    assert (failure.index, failure.wrong, failure.compared, failure.entries) == ((1, 2), 1, 12, 12)
    # finite differences know the value to 1e-10 of the size of sin
    assert failure.analytic - failure.expected == pytest.approx(0.25, abs=1e-9)
    assert failure.max_absolute_error == pytest.approx(0.25, abs=1e-9)
    larger = max(abs(failure.analytic), abs(failure.expected))
    assert failure.max_relative_error == pytest.approx(0.25 / larger, rel=1e-6)
    assert 0 < failure.tolerance < 1e-5


def test_each_output_has_its_own_result():
    two = function(lambda x: (x.sin(), x.cos()), lambda g, h, x: g * x.cos() + h * x.sin())
    failure = only_failure(gradcheck(two, randn(4)))
    assert (failure.output, failure.hint) == ("output[1]", "the sign is flipped")


# ------------------------------------------------------------------------------------------------------------- kinks


@pytest.mark.parametrize(("slope", "right"), [(0.0, True), (0.5, True), (1.0, True), (-0.1, False), (1.1, False)])
def test_any_subgradient_at_a_kink_passes_and_no_other(slope, right):
    report = gradcheck(relu_with_slope(slope), torch.tensor([-1.0, 0.0, 2.0]))
    (result,) = report.results
    assert report.ok == right, report
    assert result.kinks == 1
    assert "1 kink" in str(report)
    assert right or (result.index == (1,) and "not between its one-sided slopes" in result.hint)


def test_a_kink_between_the_steps_is_no_kink_and_hides_nothing():
    near = torch.tensor([sign * 10.0**-exponent for exponent in range(2, 8) for sign in (-1, 1)], dtype=torch.float64)
    for called in (torch.relu, torch.abs, F.hardswish, lambda x: F.relu6(x + 6)):
        report = gradcheck(called, near)
        assert report, report
        assert report.results[0].kinks == 0
    halved = function(torch.relu, lambda g, x: g * torch.where(x > 0, 1.0, 0.5))
    assert only_failure(gradcheck(halved, near)).wrong == 6


def test_kinks_that_cancel_are_smooth():
    # relu(x) - relu(-x) is x, yet autograd of it gives 0 at 0
    x = torch.zeros(1, dtype=torch.float64)
    failure = only_failure(gradcheck(lambda x: torch.relu(x) - torch.relu(-x), x))
    assert (failure.analytic, failure.kinks) == (0.0, 0)
    # apart, each output entry has its own subgradient
    assert gradcheck(lambda x: torch.cat([torch.relu(x), torch.relu(-x)]), x)


def test_kinks_inside_a_network():
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        network[0].bias.zero_()
    x = randn(3, 6)
    x[1] = 0  # every hidden unit of this row is at its kink
    report = gradcheck(network, x)
    assert next(result for result in report.results if result.name == "0.bias").kinks == 8
    # an input moves all of them at once; autograd takes the slope of each from the left, which no side of the sum has
    failure = only_failure(report)
    assert failure.name == "input 0" and failure.index[0] == 1
    assert "where several kinks meet, autograd's choice for each may not add up" in failure.hint
    assert gradcheck(network, randn(3, 6))


def test_a_kink_on_top_of_a_slope_and_a_bend():
    x = torch.zeros(3, dtype=torch.float64)
    assert gradcheck(lambda x: torch.relu(x) * (-3 * x).exp() + x.sin(), x)
    assert gradcheck(lambda x: 5 - torch.relu(x) * (3 * x).exp() + 0.5 * x, x)
