"""nacre.gradcheck on pairs of functions, large tensors, lower precision, and its report."""

import pytest
import torch
from torch import nn
from torch.autograd.gradcheck import GradcheckError

from nacre.tools.gradcheck import GradientError, gradcheck
from nacre.tools.gradcheck.numeric import EPSILON, LADDER, STEP, Slopes, best_rung
from tests.tools.gradcheck_support import (
    LINEAR,
    function,
    linear_with,
    only_failure,
    problem,
    randn,
)

F = nn.functional


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
