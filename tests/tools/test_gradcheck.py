"""nacre.gradcheck: right gradients pass, every mistake is found and named, and nothing of the user's is touched."""

import copy
import dataclasses
import random
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError

from nacre.tools.gradcheck import GradientError, gradcheck
from nacre.tools.gradcheck_numeric import EPSILON, LADDER, STEP, Slopes, best_rung

F = nn.functional


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


def linear_backward(g, x, weight, bias):
    return g @ weight, g.t() @ x, g.sum(0)


def linear_with(**changed):
    """x W' + b, with the gradients named in ``changed`` computed otherwise from (g, x, weight, bias)."""
    names = ("x", "weight", "bias")

    def backward(*tensors):
        right = linear_backward(*tensors)
        return tuple(changed[name](*tensors) if name in changed else right[k] for k, name in enumerate(names))

    return function(lambda x, weight, bias: x @ weight.t() + bias, backward)


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


LINEAR = (randn(5, 4), randn(3, 4, seed=1), randn(3, seed=2))
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


def relu_with_slope(slope):
    return function(torch.relu, lambda g, x: g * torch.where(x == 0, slope, (x > 0).double()))


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


# ------------------------------------------------------------------------------------- problems that are not one entry


def problem(*arguments, **options) -> str:
    report = gradcheck(*arguments, **options)
    assert not report.ok and len(report.problems) == 1, report
    assert report.problems[0] in report.summary() and report.problems[0] in str(report)
    return report.problems[0]


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


def test_a_result_that_changes_from_call_to_call():
    assert "the forward is not deterministic" in problem(Counter(), randn(3))
    state = random.Random(0)
    assert "not deterministic" in problem(lambda x: x[: state.randint(1, 100)], randn(100))
    noisy = function(torch.sin, lambda g, x: g * x.cos() * state.random())
    assert "the backward is not deterministic" in problem(noisy, randn(3))


def test_every_kind_of_random_number_is_drawn_anew():
    numpy = pytest.importorskip("numpy")
    generator = torch.Generator().manual_seed(4)

    def noisy(x, generator):
        noise = torch.rand(3) + random.random() + numpy.random.rand()
        return x * (noise + torch.rand(3, generator=generator))

    before = generator.get_state()
    assert gradcheck(noisy, randn(3), generator)
    assert torch.equal(generator.get_state(), before)


def test_what_the_users_code_raises_is_reported():
    def broken(*_):
        raise KeyError("no such thing")

    assert problem(broken, randn(3)) == "the forward raised KeyError: 'no such thing'"
    assert "the backward raised KeyError" in problem(function(torch.sin, broken), randn(3))


def test_a_gradient_of_the_wrong_shape():
    short = linear_with(weight=lambda g, x, w, b: x.t() @ g)
    assert "invalid gradient at index 1 - got [4, 3] but expected shape compatible with [3, 4]" in problem(
        short, *LINEAR
    )


def test_a_forward_that_changes_its_input_behind_autograds_back():
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.mul_(2).clone()

        @staticmethod
        def backward(ctx, g):
            return 2 * g

    x = randn(3)
    before = x.clone()
    assert "modifies input 0 in place without autograd knowing" in problem(Scale, x)
    assert "modifies x in place without autograd knowing" in problem(lambda x: x.data.mul_(2) * x, x=x)
    layer = nn.Embedding(3, 4, max_norm=0.5)
    assert "modifies weight in place without" in problem(layer, torch.tensor([1, 2]))
    assert torch.equal(x, before)


def test_an_honest_modification_of_an_input_passes_and_is_said():
    x = randn(6)
    before = x.clone()
    for called in (nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True), lambda x: x.mul_(3).sin()):
        report = gradcheck(called, x)
        assert report and "the forward modifies input 0 in place" in report.notes
    assert torch.equal(x, before)


def test_a_backward_that_changes_its_incoming_gradient():
    careless = function(lambda x: 2 * x, lambda g, x: g.mul_(2))
    assert "modifies its incoming gradient in place" in problem(careless, randn(3))


def test_values_that_are_not_finite():
    assert problem(torch.log, torch.tensor([1.0, -1.0])) == "output is nan at (1,); choose an input where it is not"
    assert "infinite everywhere" in problem(torch.log, torch.zeros(2))
    failure = only_failure(gradcheck(torch.sqrt, torch.tensor([0.0, 1.0])))
    assert (failure.index, failure.wrong) == ((0,), 1)


def test_masks_of_minus_infinity():
    mask = torch.tensor([[0.0, -torch.inf], [0.0, 0.0]])
    report = gradcheck(lambda x, mask: (x + mask).log_softmax(-1), randn(2, 2), mask)
    assert report, report
    assert "input 1: entries which are not finite are left as they are and not compared" in report.notes
    assert "output: its infinite entries are left out" in report.notes


def test_an_output_whose_shape_depends_on_the_values():
    x = torch.tensor([0.0, 1.0, 2.0])
    assert "change their number or shapes" in problem(lambda x: x[x >= 0] * 2, x)


# ------------------------------------------------------------------------------------------------ inputs and outputs


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


@dataclasses.dataclass
class Result:
    value: Tensor
    count: int


def test_nested_inputs_and_outputs_are_named():
    def called(x, state, *, scale, options):
        product = x * state["a"] * scale
        return {"first": Pair(product, state["b"][0].sin()), "rest": [Result(product.sum() * options["gain"], 3), None]}

    report = gradcheck(
        called, randn(2), {"a": randn(2, seed=1), "b": (randn(3), 5)}, scale=randn(1), options={"gain": 2.0}
    )
    assert report, report
    assert {result.name for result in report.results} == {"input 0", "input 1['a']", "input 1['b'][0]", "scale"}
    assert {result.output for result in report.results} == {
        "output['first'].left", "output['first'].right", "output['rest'][0].value",
    }  # fmt: skip


def test_dataclasses_and_named_tuples_as_inputs():
    report = gradcheck(
        lambda pair, result: pair.left * pair.right * result.value, Pair(randn(2), randn(2)), Result(randn(2), 1)
    )
    assert report and [r.name for r in report.results] == ["input 0.left", "input 0.right", "input 1.value"]


def test_packed_sequences():
    packed = nn.utils.rnn.pack_padded_sequence(randn(3, 2, 2), [3, 1])
    assert gradcheck(nn.GRU(2, 2), packed)


def test_integers_booleans_and_other_values_pass_through():
    seen = []

    def called(x, index, mask, text, nothing):
        seen.append((index.dtype, mask.dtype, text, nothing))
        return torch.where(mask, x, 0.0)[index], index + 1

    report = gradcheck(called, torch.randn(4), torch.tensor([0, 2]), torch.tensor([True, False, True, True]), "t", None)
    assert report and [result.name for result in report.results] == ["input 0"]
    assert set(seen) == {(torch.int64, torch.bool, "t", None)}


def test_every_floating_dtype_is_checked_in_float64():
    seen = set()

    def called(*tensors):
        seen.update(x.dtype for x in tensors)
        return sum(x * torch.linspace(0, 1, 3) for x in tensors)  # a constant made inside is float64 as well

    assert gradcheck(called, *(torch.randn(3).to(d) for d in (torch.float16, torch.bfloat16, torch.float32)))
    assert seen == {torch.float64}
    assert torch.get_default_dtype() == torch.float32


def test_where_an_input_asks_for_its_gradient_the_others_are_constants():
    x, y = randn(3).requires_grad_(), randn(3)
    report = gradcheck(lambda x, y: x * y.detach(), x, y)
    assert report and [result.name for result in report.results] == ["input 0"]
    assert "input 1 is not checked: it has requires_grad=False and other inputs have True" in report.notes
    assert not gradcheck(lambda x, y: x * y.detach(), x.detach(), y)


def test_scalars_and_tensors_without_entries():
    report = gradcheck(lambda x, y, s: (x @ y) * s, randn(0, 3), randn(3, 2), randn())
    assert report, report
    assert [(r.compared, r.index) for r in report.results] == [(0, None), (6, (0, 0)), (1, ())]
    assert gradcheck(nn.Linear(3, 2), randn(0, 3))
    assert gradcheck(lambda x: x[:0], randn(3))


def test_strides_of_inputs_are_kept():
    seen = set()

    def called(x):
        seen.add(x.stride())
        return x.sin()

    for x in (randn(3, 4).t(), randn(4, 6)[:, ::2], randn(1, 2, 3, 3).to(memory_format=torch.channels_last)):
        seen.clear()
        assert gradcheck(called, x.float() if x.is_contiguous() else x)
        assert seen == {x.stride()}
    assert gradcheck(called, randn(1, 3).expand(4, 3))
    assert gradcheck(called, randn(6).unfold(0, 3, 1))


def test_the_same_tensor_given_twice_is_two_inputs():
    x = randn(3)
    wrong_in_the_second = function(torch.mul, lambda g, x, y: (g * y, 3 * g * x))
    assert only_failure(gradcheck(wrong_in_the_second, x, x)).name == "input 1"


def test_what_is_not_supported_is_refused_by_name():
    with pytest.raises(
        TypeError, match=r"real derivatives; got input 0 of dtype torch.complex64\. Check .*view_as_real"
    ):
        gradcheck(torch.abs, torch.ones(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"output of dtype torch\.complex128"):
        gradcheck(torch.fft.fft, randn(3))
    with pytest.raises(TypeError, match=r"dense tensors; got x of layout torch.sparse_coo"):
        gradcheck(torch.sum, x=torch.eye(2).to_sparse())
    with pytest.raises(TypeError, match=r"got the class Linear. Did you mean an instance, Linear\(\.\.\.\)\?"):
        gradcheck(nn.Linear, randn(3))
    with pytest.raises(TypeError, match="got a int"):
        gradcheck(3, randn(3))
    with pytest.raises(ValueError, match=r"floating-point input, or a parameter .* got inputs of dtype torch.int64"):
        gradcheck(torch.abs, torch.ones(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"got no tensor input\. Pass the inputs of forward after the module"):
        gradcheck(nn.ReLU())
    with pytest.raises(ValueError, match="needs a floating-point output"):
        gradcheck(lambda x: x > 0, randn(3))
    with pytest.raises(ValueError, match=r"weight, uninitialised\. Call the module once"):
        gradcheck(nn.LazyLinear(3), randn(2, 3))


@pytest.mark.parametrize("option", ["rtol", "atol", "max_entries", "samples", "directions"])
def test_options_out_of_range(option):
    for value in (-1, float("nan")):
        with pytest.raises(ValueError, match=f"{option} is at least .* got {option} = {value}"):
            gradcheck(torch.sin, randn(3), **{option: value})


def test_a_module_that_cannot_be_copied():
    layer = nn.Linear(2, 2)
    layer.product = layer.weight * 2  # not a leaf: copy.deepcopy refuses it
    with pytest.raises(TypeError, match=r"deep copy of the module; got a Linear which copy\.deepcopy refuses"):
        gradcheck(layer, randn(1, 2))


# --------------------------------------------------------------------------------------------------------- parameters


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.decoder.weight = self.encoder.weight

    def forward(self, x):
        return self.decoder(self.encoder(x).tanh())


def test_tied_parameters_are_one():
    report = gradcheck(Tied(), randn(2, 3))
    assert report and [result.name for result in report.results] == ["input 0", "encoder.weight"]
    assert "encoder.weight is also decoder.weight (tied): one gradient, summed over its uses" in report.notes


def test_parameters_that_share_memory_are_checked_apart():
    layer = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    layer[1].weight = nn.Parameter(layer[0].weight.detach())
    report = gradcheck(layer, randn(2, 3))
    assert report and [result.name for result in report.results] == ["input 0", "0.weight", "1.weight"]
    assert "0.weight and 1.weight share memory but are separate parameters: each is checked on its own" in report.notes


def test_frozen_parameters_are_skipped_and_said():
    layer = nn.Linear(3, 2)
    layer.weight.requires_grad_(False)
    report = gradcheck(layer, randn(2, 3))
    assert report and [result.name for result in report.results] == ["input 0", "bias"]
    assert report.notes == ("weight is not checked: it is frozen (requires_grad=False)",)


def test_an_unused_parameter_is_said():
    layer = nn.Linear(3, 2)
    layer.register_parameter("spare", nn.Parameter(torch.ones(2)))
    report = gradcheck(layer, randn(2, 3))
    assert report and any(note.startswith("spare: the gradient is zero, as are") for note in report.notes)


def test_constants_kept_as_plain_attributes():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix = torch.randn(3, 3)

        def forward(self, x):
            return x @ self.matrix

    assert gradcheck(Scaled(), randn(2, 3))


def test_sparse_gradients():
    assert gradcheck(nn.Embedding(4, 2, sparse=True), torch.tensor([0, 2, 2]))


def test_buffers_start_anew_in_each_evaluation():
    class RunningScale(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.ones(()))

        def forward(self, x):
            self.scale = self.scale * 2
            return x * self.scale

    layer = RunningScale()
    assert gradcheck(layer, randn(3))
    assert layer.scale == 1


# -------------------------------------------------------------------------------------- nothing of the user's changes


def test_nothing_of_the_users_is_touched():
    numpy = pytest.importorskip("numpy")
    layer = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.ReLU(inplace=True), nn.Linear(4, 2))
    layer[4].eval()
    x = torch.randn(5, 3, requires_grad=True)
    layer(x).sum().backward()
    state = copy.deepcopy(layer.state_dict())
    gradients = [parameter.grad.clone() for parameter in layer.parameters()]
    values, gradient = x.detach().clone(), x.grad.clone()
    versions = [tensor._version for tensor in (x, *layer.parameters(), *layer.buffers())]
    modes = [module.training for module in layer.modules()]
    random_state, python_state, numpy_state = (
        torch.get_rng_state(),
        random.getstate(),
        numpy.random.get_state()[1].copy(),
    )

    for options in ({"raise_on_failure": True}, {"second_order": True}):
        assert gradcheck(layer, x, **options)
    with pytest.raises(GradientError):
        gradcheck(
            lambda x: x * x.detach() * torch.rand(()) * random.random() * numpy.random.rand(), x, raise_on_failure=True
        )
    with torch.no_grad():
        assert gradcheck(layer, x)
        assert not torch.is_grad_enabled()

    assert all(torch.equal(state[name], value) for name, value in layer.state_dict().items())
    assert all(parameter.dtype == torch.float32 for parameter in layer.parameters())
    assert all(torch.equal(p.grad, before) for p, before in zip(layer.parameters(), gradients, strict=True))
    assert torch.equal(x, values) and torch.equal(x.grad, gradient) and x.dtype == torch.float32
    assert versions == [tensor._version for tensor in (x, *layer.parameters(), *layer.buffers())]
    assert modes == [module.training for module in layer.modules()]
    assert torch.equal(torch.get_rng_state(), random_state)
    assert random.getstate() == python_state
    assert (numpy.random.get_state()[1] == numpy_state).all()
    assert torch.get_default_dtype() == torch.float32


def test_inference_tensors_can_be_checked():
    with torch.inference_mode():
        x = torch.randn(3)
        assert gradcheck(nn.Tanh(), x)
        assert torch.is_inference_mode_enabled()


# -------------------------------------------------------------------------------------------------------- references


def test_a_reference_module_takes_the_parameters_of_the_checked_one():
    layer, reference = nn.Linear(3, 2), nn.Linear(3, 2)
    report = gradcheck(layer, randn(4, 3), reference=reference)
    assert report, report
    assert [r.name for r in report.results if r.comparison == "reference"] == ["input 0", "weight", "bias"]
    assert not torch.equal(layer.weight, reference.weight)


def test_a_reference_sees_errors_too_small_for_finite_differences():
    class Slightly(nn.Linear):
        def forward(self, x):
            exact = F.linear(x, self.weight, self.bias)
            return wobble.apply(exact)

    wobble = function(lambda y: y.clone(), lambda g, y: g * (1 + 3e-9))
    assert gradcheck(Slightly(3, 2), randn(4, 3))
    report = gradcheck(Slightly(3, 2), randn(4, 3), reference=nn.Linear(3, 2))
    assert {failure.comparison for failure in report.failures} == {"reference"} and len(report.failures) == 3
    assert "where the reference gives" in report.summary()


def test_float32_inside_a_backward_is_named():
    rounded = function(torch.sin, lambda g, x: (g * x.cos()).float().double())
    failure = only_failure(gradcheck(rounded, randn(6), reference=torch.sin))
    assert "computed in float32" in failure.hint


def test_a_reference_function_takes_parameters_by_name():
    assert gradcheck(nn.Linear(3, 2), randn(4, 3), reference=lambda x, weight, bias: x @ weight.t() + bias)
    report = gradcheck(nn.Linear(3, 2), randn(4, 3), reference=lambda x, weight, bias: x @ weight.t() + 2 * bias)
    assert "output differs from the reference's by" in report.problems[0]
    assert gradcheck(nn.Tanh(), randn(3), reference=torch.tanh)


def test_a_recurrent_reference_whose_weights_are_kept_in_a_list_too():
    assert gradcheck(nn.LSTM(2, 2), randn(3, 1, 2), reference=nn.LSTM(2, 2))


def test_a_reference_shares_mode_buffers_and_random_state():
    layer = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5))
    layer(torch.randn(8, 3))
    for mode in (True, False):
        assert gradcheck(layer.train(mode), randn(4, 3), reference=nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5)))


def test_a_reference_that_does_not_fit():
    with pytest.raises(ValueError, match=r"weight of shape \(5, 3\) in the reference, \(2, 3\) in the module"):
        gradcheck(nn.Linear(3, 2), randn(4, 3), reference=nn.Linear(3, 5))
    assert "returns other outputs" in problem_of_reference(torch.sin, lambda x: (x.sin(), x))
    assert "output differs from the reference's by" in problem_of_reference(torch.sin, torch.cos)
    assert "the forward raised" in problem_of_reference(torch.sin, lambda: 1)
    report = gradcheck(nn.Tanh(), randn(2, 3), reference=nn.Sequential(nn.Linear(3, 3), nn.Tanh()))
    assert "0.weight of the reference is not in what is checked, and keeps its own values" in report.notes


def problem_of_reference(called, reference) -> str:
    return gradcheck(called, randn(3), reference=reference).problems[0]


def test_a_reference_may_choose_another_subgradient():
    report = gradcheck(relu_with_slope(0.5), torch.tensor([-1.0, 0.0, 2.0]), reference=torch.relu)
    assert report, report


# -------------------------------------------------------------------------- pairs of functions, Functions, second order


def pair_forward(x, weight, bias):
    return x @ weight.t() + bias, (x, weight)


def pair_backward(g, saved):
    x, weight = saved
    return g @ weight, g.t() @ x, g.sum(0)


def test_a_pair_of_forward_and_backward():
    report = gradcheck((pair_forward, pair_backward), *LINEAR, second_order=True)
    assert report and report.name == "(pair_forward, pair_backward)"
    doubled = lambda g, saved: (pair_backward(g, saved)[0], 2 * pair_backward(g, saved)[1], g.sum(0))
    assert only_failure(gradcheck((pair_forward, doubled), *LINEAR)).hint == "off by a factor of 2.0"


def test_what_a_pair_saves_is_differentiated_again():
    tanh = lambda x: (x.tanh(), x.tanh())
    assert gradcheck((tanh, lambda g, y: g * (1 - y * y)), randn(4), second_order=True)


def test_a_pair_with_needs_keywords_and_other_arguments():
    def forward(x, power, *, scale):
        return x**power * scale, (x, power, scale)

    def backward(g, saved, needs):
        x, power, scale = saved
        assert needs == [True, True]
        return g * power * x ** (power - 1) * scale, (g * x**power).sum()

    assert gradcheck((forward, backward), randn(4), 3, scale=randn())


def test_a_pair_may_return_a_gradient_for_each_argument():
    forward = lambda x, index, y: (x[index] * y, (x, index, y))

    def backward(g, saved):
        x, index, y = saved
        return torch.zeros_like(x).index_add(0, index, g * y), None, g * x[index]

    assert gradcheck((forward, backward), randn(4), torch.tensor([1, 1, 3]), randn(3))


@pytest.mark.parametrize(
    ("bias", "cause"),
    [
        (lambda g: g, "It is not summed over dimension 0."),
        (lambda g: g.sum(0, keepdim=True), "It is not summed over dimension 0."),
        (lambda g: g[0, :2], ""),
    ],
)
def test_a_pairs_gradient_of_the_wrong_shape(bias, cause):
    backward = lambda g, saved: (*pair_backward(g, saved)[:2], bias(g))
    found = problem((pair_forward, backward), *LINEAR)
    assert "the gradient of input 2 has its shape, (3,); got a gradient of shape" in found
    assert found.endswith(cause) if cause else found.endswith(".")


def test_a_pairs_gradient_that_is_transposed_or_missing():
    backward = lambda g, saved: (g @ saved[1], saved[0].t() @ g, g.sum(0))
    assert problem((pair_forward, backward), *LINEAR).endswith("got a gradient of shape (4, 3). It is transposed.")
    assert "one gradient for each floating-point input" in problem((pair_forward, lambda g, saved: g), *LINEAR)


def test_functions_by_class_and_by_apply():
    right = function(torch.sin, lambda g, x: g * x.cos())
    assert gradcheck(right, randn(3)) and gradcheck(right.apply, randn(3))
    assert gradcheck(right, randn(3)).name == gradcheck(right.apply, randn(3)).name == "Handwritten"


def test_a_backward_that_says_it_cannot_be_differentiated_again():
    class Sine(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return g * ctx.saved_tensors[0].cos()

    assert gradcheck(Sine, randn(3))
    report = gradcheck(Sine, randn(3), second_order=True)
    assert [failure.order for failure in report.failures] == [2, 2]


def test_a_backward_that_is_right_but_loses_the_second_order():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.doubled = 2 * x  # an intermediate, and so a constant to the second derivative
            return x * x

        @staticmethod
        def backward(ctx, g):
            return g * ctx.doubled

    assert gradcheck(Square, randn(3))
    failure = only_failure(gradcheck(Square, randn(3), second_order=True))
    assert (failure.order, failure.output, failure.name) == (2, "gradient of input 0", "input 0")
    assert "missing" in failure.hint
    assert not gradcheck(Square, randn(3), second_order=True, reference=torch.square)


# ------------------------------------------------------------------------------------------- large tensors are sampled


def test_a_large_tensor_is_sampled_and_said():
    report = gradcheck(torch.sin, randn(50, 100), max_entries=1000, samples=20)
    assert report, report
    assert [(r.comparison, r.compared, r.entries) for r in report.results] == [
        ("finite differences", 20, 5000), ("random directions", 4, 5000),
    ]  # fmt: skip
    note = "input 0: 20 of its 5000 entries and 4 random directions were compared (seed 0)"
    assert note in report.notes and "20 of 5000" in str(report) and "4 directions" in str(report)
    assert str(report) == str(gradcheck(torch.sin, randn(50, 100), max_entries=1000, samples=20))
    other = gradcheck(torch.sin, randn(50, 100), max_entries=1000, samples=20, seed=1)
    assert str(report) != str(other)


def test_one_wrong_entry_of_a_large_tensor_is_found_by_direction_and_traced():
    def backward(g, x):
        gradient = g * x.cos()
        gradient[77, 31] *= 1.5
        return gradient

    report = gradcheck(function(torch.sin, backward), randn(100, 60))
    failure = only_failure(report)
    assert (failure.comparison, failure.index, failure.wrong) == ("random directions", (77, 31), 4)
    assert failure.analytic == pytest.approx(1.5 * failure.expected)


def test_kinks_along_a_direction():
    assert gradcheck(nn.Sequential(nn.ReLU(), nn.Linear(100, 1)), randn(80, 100))


def test_entries_that_are_not_finite_in_a_large_tensor():
    x = randn(5000)
    x[7] = torch.inf
    assert gradcheck(lambda x: 1 / (1 + x * x), x)


# -------------------------------------------------------------------------------------- functions of lower precision


def test_a_function_that_computes_in_float32():
    inside = lambda x: (x.float().sin() * 2).double()
    assert gradcheck(inside, randn(20))
    wrong = function(inside, lambda g, x: g * x.cos() * 2 * 1.02)
    assert only_failure(gradcheck(wrong, randn(20))).wrong == 20
    cut = lambda x: inside(x).detach() + 0 * x
    assert only_failure(gradcheck(cut, randn(20))).wrong == 20
    assert gradcheck(lambda x: x.float().sin(), randn(5))


def test_rounding_inside_that_is_larger_than_the_output():
    # the output is small, the rounding of 1e8 inside is not
    cancelling = lambda x: (x.sin() + 1e8) - 1e8
    assert gradcheck(cancelling, randn(10))
    assert not gradcheck(function(cancelling, lambda g, x: 1.01 * g * x.cos()), randn(10))


def test_rounding_of_a_large_output_is_overcome_by_larger_steps():
    offset = lambda x: (x + 1e6).square().sum() - 1e12  # 2e13, known to 4e-3
    x = randn(10)
    assert gradcheck(offset, x)
    slightly = function(lambda x: x.clone(), lambda g, x: g * (1 + 1e-4))
    assert not gradcheck(lambda x: offset(slightly.apply(x)), x)


def test_inputs_far_larger_than_their_differences():
    variance = lambda x: x.var(-1)  # a step is 7.6e-6 of 1e5, and bends it
    x = randn(4, 9) + 1e5
    assert gradcheck(variance, x)
    slightly = function(lambda x: x.clone(), lambda g, x: g * (1 + 1e-4))
    assert not gradcheck(lambda x: variance(slightly.apply(x)), x)


def test_a_gradient_too_small_to_be_seen_is_said():
    # batch norm takes a shift away again
    report = gradcheck(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), randn(5, 3))
    assert report, report
    assert any(note.startswith("0.bias: the gradient, of ") and "to tell from zero" in note for note in report.notes)


def test_the_best_step_is_where_rounding_and_truncation_meet():
    def rungs(third_derivative, rounding):
        slopes = []
        for number, step in enumerate(LADDER):
            central = 1 + third_derivative * step**2 / 6 + rounding * (-1) ** number / step
            slopes.append(Slopes(step, central, central, central, 2 * abs(central), 0.0))
        return slopes

    for third_derivative, rounding in ((1.0, EPSILON), (1e4, EPSILON), (1.0, 1e-8), (0.0, 1e-12)):
        best, error = best_rung(rungs(third_derivative, rounding), 0.0)
        assert abs(best.central - 1) <= 2 * error
        # the optimum of h^2 f'''/6 + r/h, with room for a ladder whose steps are 8 apart
        step = (3 * rounding / third_derivative) ** (1 / 3) if third_derivative else LADDER[-1]
        assert error <= 100 * (third_derivative * step**2 / 6 + rounding / step)
    assert STEP / 2 < EPSILON ** (1 / 3) < STEP * 2


# ------------------------------------------------------------------------------------------------------------- report


def test_the_report_reads_well():
    report = gradcheck(linear_with(weight=lambda g, x, w, b: 2 * g.t() @ x), *LINEAR)
    lines = str(report).splitlines()
    assert lines[0] == "gradient check of Handwritten: FAILED"
    assert lines[1].split("  ")[1] == "gradient of" and len(lines) == 6
    assert [line.split()[-1] for line in lines[2:5]] == ["ok", "WRONG", "ok"]
    assert "wrong: d output / d input 1 is wrong at 12 of 12 compared, worst at (" in lines[5]
    assert lines[5].endswith("likely cause: off by a factor of 2.0")
    assert (
        report.summary().startswith("Handwritten: WRONG, d output / d input 1 is wrong")
        and "\n" not in report.summary()
    )
    right = gradcheck(nn.LSTM(2, 2), randn(2, 1, 2))
    assert right.summary().startswith(
        "LSTM: ok, right gradients of input 0, weight_ih_l0, weight_hh_l0, bias_ih_l0, ...;"
    )


def test_a_failure_is_raised_only_where_asked_for():
    wrong = linear_with(weight=lambda g, x, w, b: 2 * g.t() @ x)
    assert gradcheck(nn.Tanh(), randn(3), raise_on_failure=True)
    with pytest.raises(GradientError, match=r"d output / d input 1 is wrong at 12 of 12 .* factor of 2.0") as caught:
        gradcheck(wrong, *LINEAR, raise_on_failure=True)
    assert isinstance(caught.value, GradcheckError) and isinstance(caught.value, RuntimeError)
    assert caught.value.report.failures[0].name == "input 1"

    def broken(x):
        raise KeyError("lost")

    with pytest.raises(GradientError, match="the forward raised KeyError: 'lost'") as caught:
        gradcheck(broken, randn(3), raise_on_failure=True)
    assert isinstance(caught.value.__cause__.__cause__, KeyError)
