"""What is special to CrossEntropyLoss; the contract test holds the rest."""

import itertools
import math

import pytest
import torch

import nacre
from nacre.functional import cross_entropy, linear_cross_entropy
from tests.layers.cross_entropy_support import logits, torch_cross_entropy

# ---- values that are known


def test_no_preference_costs_the_logarithm_of_the_classes():
    for classes in (1, 2, 10, 1000):
        found = cross_entropy(torch.zeros(3, classes), torch.zeros(3, dtype=torch.int64))
        # one rounding of the logarithm
        assert found.item() == pytest.approx(math.log(classes), rel=1e-6)


def test_gradient_is_softmax_minus_target():
    x = logits(4, 5).requires_grad_()
    y = torch.tensor([0, 2, 4, 2])
    (gradient,) = torch.autograd.grad(cross_entropy(x, y, reduction="sum"), x)
    expected = x.detach().softmax(1) - torch.nn.functional.one_hot(y, 5)
    # float64 sums of five terms
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)
    (rows,) = torch.autograd.grad(cross_entropy(x, y, reduction="sum", label_smoothing=0.3), x)
    assert rows.sum(1).abs().max() < 1e-14


def test_smoothed_index_equals_its_distribution():
    x, y = logits(4, 5), torch.tensor([0, 2, 4, 2])
    given = 0.8 * torch.nn.functional.one_hot(y, 5).double() + 0.2 / 5
    # float64 sums of five terms
    torch.testing.assert_close(cross_entropy(x, y, label_smoothing=0.2), cross_entropy(x, given), rtol=1e-12, atol=0)


# ---- edges


@pytest.mark.parametrize("scale", [1e4, 1e8])
def test_huge_logits_lose_nothing(scale):
    """Beside a common size of 1e4 the differences count; log-sum-exp as one number would round them to 1e-3."""
    differences = torch.tensor([[0.0, 0.5, -1.0, 0.25]]) * (scale / 1e4)
    x = (scale + differences).requires_grad_()
    loss = cross_entropy(x, torch.tensor([2]))
    exact = x.detach().double().requires_grad_()
    judge = torch_cross_entropy(exact, torch.tensor([2]))
    loss.backward(), judge.backward()
    # float32 of a well-conditioned sum of four terms
    torch.testing.assert_close(loss.double(), judge, rtol=1e-6, atol=0)
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-5, atol=1e-7)


def test_infinitely_unlikely_classes_as_in_torch():
    x = logits(3, 4)
    x[:, 2] = -math.inf
    x[2] = -math.inf
    for target in (torch.tensor([0, 1, 3]), torch.tensor([2, 2, 2]), torch.full((3, 4), 0.25, dtype=torch.float64)):
        for smoothing in (0.0, 0.1):
            ours, torchs = (x.clone().requires_grad_() for _ in range(2))
            found = cross_entropy(ours, target, reduction="none", label_smoothing=smoothing)
            expected = torch_cross_entropy(torchs, target, reduction="none", label_smoothing=smoothing)
            # float64 sums of four terms
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=0, equal_nan=True)
            found.sum().backward(), expected.sum().backward()
            torch.testing.assert_close(ours.grad, torchs.grad, rtol=1e-12, atol=1e-15, equal_nan=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_nothing_to_average_is_nan_with_a_zero_gradient(smoothing):
    x = torch.randn(3, 5, requires_grad=True)
    loss = cross_entropy(x, torch.full((3,), -100), label_smoothing=smoothing)
    assert loss.isnan()
    (gradient,) = torch.autograd.grad(loss, x)
    assert torch.equal(gradient, torch.zeros(3, 5))
    assert cross_entropy(x[:0], torch.zeros(0, dtype=torch.int64), label_smoothing=smoothing).isnan()
    assert cross_entropy(x[:0], torch.zeros(0, 5), label_smoothing=smoothing).isnan()


def test_no_classes_as_in_torch():
    target = torch.full((4,), -100)
    assert cross_entropy(torch.randn(4, 0), target).isnan()
    assert linear_cross_entropy(torch.randn(4, 3), torch.randn(0, 3), target).isnan()
    assert cross_entropy(torch.randn(4, 0), torch.randn(4, 0), reduction="none").tolist() == [0, 0, 0, 0]


def test_ignored_tokens_have_no_say():
    x = logits(4, 5).requires_grad_()
    y = torch.tensor([1, -7, 3, -7])
    found = cross_entropy(x, y, ignore_index=-7)
    torch.testing.assert_close(found, cross_entropy(x[::2], y[::2]), rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(found, x)
    assert torch.equal(gradient[1::2], torch.zeros(2, 5, dtype=torch.float64))


def test_rarely_used_targets():
    x, y = torch.randn(3, 5), torch.tensor([1, 0, 4])
    assert torch.equal(cross_entropy(x, y.byte()), cross_entropy(x, y))
    assert torch.equal(cross_entropy(x[0], y[:1]), cross_entropy(x[0], y[0]))
    assert torch.equal(cross_entropy(x, y, label_smoothing=-1.0), cross_entropy(x, y))


def test_dtypes_of_probabilities_are_promoted():
    x, q = torch.randn(3, 5), torch.rand(3, 5)
    for given, target, weight in itertools.product(
        (torch.bfloat16, torch.float32), (torch.float16, torch.float32, torch.float64), (None, torch.float64)
    ):
        class_weight = None if weight is None else torch.rand(5, dtype=weight)
        ours, torchs = (x.to(given).requires_grad_() for _ in range(2))
        found = cross_entropy(ours, q.to(target), class_weight)
        expected = torch_cross_entropy(torchs, q.to(target), class_weight)
        assert found.dtype == expected.dtype
        found.backward(), expected.backward()
        assert ours.grad.dtype == given
        # torch rounds the logarithms to the dtype of the logits
        torch.testing.assert_close(found, expected, rtol=0.02 if given is torch.bfloat16 else 1e-3, atol=0)


def test_class_weights_have_a_gradient_beside_probabilities():
    x, q = logits(4, 5, 2), logits(4, 5, 2).softmax(1)
    w = torch.rand(5, dtype=torch.float64)
    for keywords in ({}, {"reduction": "sum"}, {"label_smoothing": 0.3}):
        ours, torchs = (w.clone().requires_grad_() for _ in range(2))
        cross_entropy(x, q, ours, **keywords).backward()
        torch_cross_entropy(x, q, torchs, **keywords).backward()
        # float64 sums of eight terms
        torch.testing.assert_close(ours.grad, torchs.grad, rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(lambda w, q: cross_entropy(x, q, w), (w.requires_grad_(), q.requires_grad_()))
    (rows,) = torch.autograd.grad(cross_entropy(x[0, :, 0], q[0, :, 0], w), w)
    assert rows.shape == (5,)


@pytest.mark.parametrize(
    ("legacy", "reduction"),
    [
        ({"size_average": False}, "sum"),
        ({"reduce": False}, "none"),
        ({"size_average": True, "reduce": True}, "mean"),
    ],
)
def test_legacy_arguments(legacy, reduction):
    x, y = torch.randn(3, 5), torch.tensor([1, 0, 4])
    with pytest.warns(UserWarning, match=f"reduction='{reduction}'"):
        found = cross_entropy(x, y, **legacy)
    assert torch.equal(found, cross_entropy(x, y, reduction=reduction))
    with pytest.warns(UserWarning):
        layer = nacre.CrossEntropyLoss(**legacy)
    assert layer.reduction == reduction
    with pytest.warns(UserWarning, match="elementwise_mean"):
        assert torch.equal(cross_entropy(x, y, reduction="elementwise_mean"), cross_entropy(x, y))


# ---- errors


def x(*shape, **keywords):
    return torch.zeros(shape, **keywords)


def y(*shape, fill=0, dtype=torch.int64):
    return torch.full(shape, fill, dtype=dtype)


BAD = {
    "no such class": (IndexError, (x(4, 5), y(4, fill=7)), {}, "Target 7 is out of bounds.*classes are 0 to 4"),
    "negative class": (IndexError, (x(4, 5), y(4, fill=-1)), {}, "Target -1 is out of bounds"),
    "no such class, smoothed": (IndexError, (x(4, 5), y(4, fill=7), x(5)), {"label_smoothing": 0.1}, "out of bounds"),
    "no such class in an image": (IndexError, (x(2, 3, 2, 2), y(2, 2, 2, fill=3)), {}, "Target 3"),
    "int32": (RuntimeError, (x(4, 5), y(4, dtype=torch.int32)), {}, "Long or Byte.*int32.*long"),
    "bytes in an image": (RuntimeError, (x(2, 3, 2, 2), y(2, 2, 2, dtype=torch.uint8)), {}, "uint8"),
    "float classes": (RuntimeError, (x(4, 5), x(4)), {}, "Long or Byte"),
    "integer probabilities": (RuntimeError, (x(4, 5), y(4, 5)), {}, "Expected floating point type.*without the dim"),
    "batches": (ValueError, (x(4, 5), y(3)), {}, r"batch_size \(4\) to match target batch_size \(3\)"),
    "batch and one target": (ValueError, (x(4, 5), y()), {}, "batch_size"),
    "one token and two targets": (ValueError, (x(5), y(2)), {}, "take one index"),
    "places": (RuntimeError, (x(2, 3, 4), y(2, 3)), {}, r"Expected target size \(2, 4\).*\(2, 3\)"),
    "classes of probabilities": (RuntimeError, (x(4, 5), x(4, 6)), {}, r"\(4, 5\) for class probabilities"),
    "weights": (RuntimeError, (x(4, 5), y(4), x(4)), {}, "all 5 classes or no classes"),
    "dtype of weights": (RuntimeError, (x(4, 5), y(4), x(5, dtype=torch.float64)), {}, "one dtype.*float64"),
    "gradient of weights": (RuntimeError, (x(4, 5), y(4), x(5, requires_grad=True)), {}, "detach"),
    "smoothing": (RuntimeError, (x(4, 5), y(4)), {"label_smoothing": 1.5}, "between 0.0 and 1.0.*1.5"),
    "ignored probabilities": (RuntimeError, (x(4, 5), x(4, 5)), {"ignore_index": 1}, "not supported"),
    "reduction": (ValueError, (x(4, 5), y(4)), {"reduction": "average"}, "average"),
    "no dimension": (IndexError, (x(), x()), {}, "no dimensions"),
    "integer logits": (NotImplementedError, (y(4, 5), y(4)), {}, "Long"),
    "devices": (RuntimeError, (x(4, 5), y(4).to("meta")), {}, "one device.*meta"),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_are_of_torchs_type(name):
    kind, arguments, keywords, message = BAD[name]
    with pytest.raises(kind, match=message) as ours:
        cross_entropy(*arguments, **keywords)
    with pytest.raises(kind) as torchs:
        torch_cross_entropy(*arguments, **keywords)
    assert ours.type is torchs.type


def test_a_bad_class_is_found_in_a_compiled_model():
    compiled = torch.compile(nacre.CrossEntropyLoss(), fullgraph=True, backend="aot_eager")
    assert compiled(torch.zeros(4, 5), torch.zeros(4, dtype=torch.int64)) > 0
    with pytest.raises(IndexError, match="Target 9"):
        compiled(torch.zeros(4, 5), torch.full((4,), 9))


def test_a_single_weighted_token_in_a_compiled_model():
    loss = nacre.CrossEntropyLoss(torch.tensor([0.5, 2.0, 1.0]))
    logits, target = torch.randn(3), torch.tensor(1)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits, target), torch.nn.functional.cross_entropy(logits, target))
