"""What is special to the kernel of CrossEntropyLoss: every size, dtype and layout, special values, bad arguments."""

import itertools
import math

import pytest
import torch

from nacre.core import native
from nacre.core.choice import record_choices
from nacre.functional import cross_entropy
from tests.layers.cross_entropy_support import torch_cross_entropy
from tests.support import assert_as_good_as_torch

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# rows around one vector and around four, primes; the same beside places, for tiles of whole and partial vectors
SHAPES = [(7, classes) for classes in (1, 2, 15, 16, 17, 63, 64, 65, 1023, 5003)]
SHAPES += [(3,), (2, 5, 7), (1, 65, 17), (2, 3, 1031), (2, 1023, 33), (2, 3, 5, 7)]
# many short rows, which are columns to the kernel; columns of several outer positions in a tile; several tiles in one
SHAPES += [(16, 1), (517, 2), (1037, 8), (150, 3, 31), (2, 21, 1000)]
OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothed": {"label_smoothing": 0.1},
    "weights": {"weight": True},
    "all": {"weight": True, "label_smoothing": 0.3, "reduction": "none"},
}


def results(function, input, target, grad=1.0, **keywords):
    leaf = input.detach().requires_grad_()
    loss = function(leaf, target, **keywords)
    return loss.detach(), torch.autograd.grad(loss, leaf, torch.as_tensor(grad).to(loss.dtype).expand(loss.shape))[0]


def kernel_results(*arguments, **keywords):
    with record_choices() as choices:
        found = results(cross_entropy, *arguments, **keywords)
    if not native.unavailable():
        assert [choice.implementation for choice in choices] == ["C++ kernel", "C++ kernel"]
    return found


def targets(shape, ignored=True):
    classes = shape[1 if len(shape) > 1 else 0]
    target = torch.randint(classes, (*shape[:1], *shape[2:]) if len(shape) > 1 else ())
    if ignored and target.numel() > 1:
        target.view(-1)[1::3] = -100
    return target


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_at_most_twice_torchs(shape, dtype, options):
    input, target, grad = (torch.randn(shape) * 3).to(dtype), targets(shape), torch.tensor(0.7)
    keywords = dict(options)
    if keywords.pop("weight", False):
        keywords["weight"] = torch.rand(shape[1 if len(shape) > 1 else 0]).to(dtype) + 0.1
    found = kernel_results(input, target, grad.to(dtype), **keywords)
    exact_keywords = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in keywords.items()}
    exact = results(torch_cross_entropy, input.double(), target, grad.to(dtype), **exact_keywords)
    torchs = results(torch_cross_entropy, input, target, grad.to(dtype), **keywords)
    for one, two, judge in zip(found, torchs, exact, strict=True):
        assert one.stride() == two.stride()
        # a sum over classes or tokens may pass the largest float16 in torch's loss, where ours is rounded once
        two = torch.where(two.isinf() & judge.isfinite(), judge.to(dtype), two)
        assert_as_good_as_torch(one, two, judge, dtype, f"{shape}, {options}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_of_any_layout(dtype):
    inputs = {
        "unaligned": torch.randn(5 * 33 + 1).to(dtype)[1:].view(5, 33),
        "a window": torch.randn(5, 40).to(dtype)[:, 3:36],
        "every second": torch.randn(5, 66).to(dtype)[:, ::2],
        "transposed": torch.randn(33, 5).to(dtype).T,
        "places last": torch.randn(2, 3, 4, 33).to(dtype).permute(0, 3, 1, 2),
    }
    for layout, input in inputs.items():
        target = targets(input.shape)
        scattered = torch.stack([target, target], -1)[..., 1]
        for keywords in ({}, {"reduction": "none"}):
            found = kernel_results(input, scattered, **keywords)
            for one, two in zip(found, kernel_results(input.contiguous(), target, **keywords), strict=True):
                assert torch.equal(one, two), layout
                assert one.is_contiguous()


@pytest.mark.parametrize("special", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("shape", [(5, 3), (5, 70), (1, 70, 5), (40, 3), (5, 3, 8)])
def test_tokens_that_are_not_finite_stay_apart(shape, special):
    tokens = shape[:1] + shape[2:]
    for target, where, smoothing in itertools.product((0, 2, -100), ("first", "last", "everywhere"), (0.0, 0.2)):
        input = torch.randn(shape)
        classes = torch.tensor([1, 2, target, 0, -100]).repeat(math.prod(tokens) // 5).view(tokens)
        token = input[2] if len(shape) == 2 else input[0, :, 2]
        token[{"first": 0, "last": -1, "everywhere": slice(None)}[where]] = special
        arguments = {"reduction": "none", "label_smoothing": smoothing}
        found = kernel_results(input, classes, **arguments)
        for one, two in zip(found, results(torch_cross_entropy, input, classes, **arguments), strict=True):
            # float32: exp and log of two implementations, sums of 70 terms
            torch.testing.assert_close(one, two, rtol=1e-5, atol=2e-6, equal_nan=True)


@pytest.mark.usual_algorithms
@pytest.mark.parametrize("shape", [(3001, 193), (3, 21, 5003), (30_011, 7)])
def test_same_bits_for_any_number_of_threads(shape):
    input, target = torch.randn(shape), targets(shape)
    found = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        found.append(kernel_results(input, target, label_smoothing=0.1))
    for result in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], result, strict=True))


@pytest.mark.parametrize("shape", [(0, 5), (0, 21, 40), (2, 3, 0)])
def test_no_tokens_at_all(shape):
    input, target = torch.randn(shape), torch.zeros(shape[:1] + shape[2:], dtype=torch.int64)
    for reduction in ("none", "sum", "mean"):
        loss, gradient = kernel_results(input, target, reduction=reduction)
        for one, two in zip(
            (loss, gradient), results(torch_cross_entropy, input, target, reduction=reduction), strict=True
        ):
            assert torch.equal(one.nan_to_num(7.0), two.nan_to_num(7.0))


def test_the_sum_over_many_tokens_loses_nothing():
    input, target = torch.randn(200_003, 3) + 4, torch.randint(3, (200_003,))
    exact = torch_cross_entropy(input.double(), target, reduction="sum")
    # float32 losses, each rounded three times and in no preferred direction, added in float64 and rounded once
    torch.testing.assert_close(cross_entropy(input, target, reduction="sum").double(), exact, rtol=1e-7, atol=0)


def test_what_is_written_past_the_cache():
    for shape in ((2100, 4096), (2100, 5, 800)):
        input, target = torch.randn(shape), targets(shape)
        found = kernel_results(input, target, reduction="sum")
        few = kernel_results(input[:9], target[:9], reduction="sum")
        torchs = results(torch_cross_entropy, input, target, reduction="sum")
        for one, two in zip(found, torchs, strict=True):
            # float32 sums of 4096 terms
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
        assert torch.equal(found[1][:9], few[1])


def test_what_the_formula_keeps():
    x, y = torch.randn(3, 5), torch.tensor([0, 4, 2])
    weight = torch.rand(5)
    calls = {
        "class indices": lambda: cross_entropy(x, x.softmax(1)),
        "without a gradient": lambda: cross_entropy(x, y, weight.requires_grad_()),
    }
    for reason, call in calls.items():
        with torch.no_grad(), record_choices() as choices:
            call()
        assert [choice.implementation for choice in choices] == ["formula"]
        assert native.unavailable() or reason in choices[0].reason


def test_a_bad_class_is_found_by_the_backward_too():
    x, y = torch.randn(3, 5), torch.tensor([0, 4, 2])
    settings = (None, "mean", -100, 0.0)
    _, maximum, log_sum = torch.ops.nacre.cross_entropy(x, y, *settings)
    for bad in (5, -1, 2**62, -(2**63)):
        with pytest.raises(IndexError if not native.unavailable() else RuntimeError, match="out of bounds"):
            y[1] = bad
            needs = [True, False, False]
            torch.ops.nacre.cross_entropy_backward(torch.tensor(1.0), x, y, *settings, maximum, log_sum, needs)


def test_the_kernel_itself_refuses_what_does_not_fit():
    if reason := native.unavailable():
        pytest.skip(reason)
    forward, backward = torch.ops.nacre.cross_entropy.kernel, torch.ops.nacre.cross_entropy_backward.kernel
    x, y, one = torch.randn(4, 6), torch.zeros(4, dtype=torch.int64), torch.tensor(1.0)
    statistic, mean, needs = torch.zeros(4, 1), (None, "mean", -100, 0.0), [True, False, False]
    for message, call in {
        "at least one class": lambda: forward(x[:, :0], y, *mean),
        "class indices": lambda: forward(x, y.int(), *mean),
        "one target": lambda: forward(x, y[:2], *mean),
        "one weight": lambda: forward(x, y, x[0, :5], "mean", -100, 0.0),
        "none, mean or sum": lambda: forward(x, y, None, "average", -100, 0.0),
        "float32, float64": lambda: forward(x.int(), y, *mean),
        "gradient of the logits": lambda: backward(one, x, y, *mean, statistic, statistic, [True, False, True]),
        "one gradient a loss": lambda: backward(x, x, y, *mean, statistic, statistic, needs),
        "two statistics": lambda: backward(one, x, y, *mean, statistic[:2], statistic, needs),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call()
