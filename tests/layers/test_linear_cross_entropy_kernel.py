"""The kernel of LinearCrossEntropyLoss: sizes, layouts, threads, memory, and the gradients which its forward forms."""

import itertools
import math

import pytest
import torch

import nacre
from nacre.core import native
from nacre.core.choice import record_choices
from nacre.functional import linear_cross_entropy
from nacre.layers.cross_entropy.linear_layer import _last_backward
from tests.layers.cross_entropy_support import reference
from tests.support import assert_as_good_as_torch

pytestmark = pytest.mark.skipif(native.unavailable() != "", reason="the kernels were not built")

# N, D, C: around tiles, vectors and panels, primes; several chunks of 256 rows; left factors in blocks of the depth
SHAPES = [(1, 1, 1), (2, 15, 17), (5, 3, 65), (7, 63, 64), (13, 17, 1023), (65, 5, 2), (700, 33, 311), (300, 401, 1009)]
OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothed": {"label_smoothing": 0.1},
    "all": {"weight": True, "label_smoothing": 0.3},
}


def drawn(rows, features, classes, dtype=torch.float32):
    shapes = (rows, features), (classes, features), (classes,)
    x, w, b = (torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes)
    target = torch.randint(classes, (rows,))
    target[1::3] = -100
    return x, w, b, target


def results(function, x, w, b, target, grad=0.7, **keywords):
    leaves = [tensor.detach().requires_grad_() for tensor in (x, w, b)]
    loss = function(*leaves, target, **keywords)
    return loss.detach(), *torch.autograd.grad(loss, leaves, torch.full_like(loss, grad))


def ours(x, w, b, target, **keywords):
    return linear_cross_entropy(x, w, target, linear_bias=b, **keywords)


def torchs(x, w, b, target, **keywords):
    return reference(x, w, target, b, **keywords)


def kernel_results(*arguments, **keywords):
    with record_choices() as choices:
        found = results(ours, *arguments, **keywords)
    assert [choice.implementation for choice in choices] == ["C++ kernel", "C++ kernel"]
    return found


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_at_most_twice_torchs(shape, dtype, options):
    arguments, keywords = drawn(*shape, dtype), dict(options)
    if keywords.pop("weight", False):
        keywords["weight"] = torch.rand(shape[-1]).to(dtype) + 0.1
    exact_keywords = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in keywords.items()}
    found, theirs = kernel_results(*arguments, **keywords), results(torchs, *arguments, **keywords)
    exact = results(torchs, *(t.double() for t in arguments[:3]), arguments[3], **exact_keywords)
    for one, two, judge in zip(found, theirs, exact, strict=True):
        assert one.shape == two.shape and one.stride() == two.stride()
        assert_as_good_as_torch(one, two, judge, dtype, f"{shape}, {options}")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_memory_of_any_layout(reduction):
    x, w, b, target = drawn(37, 43, 29)
    dense = kernel_results(x, w, b, target, reduction=reduction)
    layouts = {
        "unaligned": lambda t: torch.cat([torch.zeros(1), t.flatten()])[1:].view(t.shape),
        "transposed": lambda t: t.t().contiguous().t(),
        "every second": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    }
    for (name, lay_out), which in itertools.product(layouts.items(), range(3)):
        given = [x, w, b]
        given[which] = lay_out(given[which])
        scattered = torch.stack([target, target], -1)[..., 1]
        for one, two in zip(kernel_results(*given, scattered, reduction=reduction), dense, strict=True):
            # sums of 43 products of about 1, in any order
            torch.testing.assert_close(one, two, rtol=0, atol=2e-5, msg=name)


@pytest.mark.parametrize("special", [math.inf, -math.inf, math.nan])
def test_rows_that_are_not_finite_stay_apart(special):
    for smoothing, y in itertools.product((0.0, 0.2), (2, -100)):
        x, w, b, target = drawn(9, 5, 70)
        x[4, 2], target[4] = special, y
        found = kernel_results(x, w, b, target, reduction="none", label_smoothing=smoothing)
        theirs = results(torchs, x, w, b, target, reduction="none", label_smoothing=smoothing)
        others = torch.arange(9) != 4
        for one, two in zip(found[:2], theirs[:2], strict=True):
            # float32 sums of 70 terms
            torch.testing.assert_close(one[others], two[others], rtol=1e-5, atol=5e-6)
            assert torch.equal(one[4].isfinite(), two[4].isfinite())


@pytest.mark.usual_algorithms
@pytest.mark.parametrize("shape", [(300, 401, 1009), (523, 64, 2003)], ids=str)
def test_same_bits_for_any_number_of_threads(shape):
    arguments, found = drawn(*shape), []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        found.append(kernel_results(*arguments, label_smoothing=0.1))
    for result in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], result, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_all_logits_never_exist(reduction):
    rows, features, classes = 1024, 8, 4000
    x, w, b, target = drawn(rows, features, classes)
    nacre.memory.empty_cache()
    nacre.memory.reset_peak()
    before = nacre.memory.stats().used
    found = kernel_results(x, w, b, target, reduction=reduction)
    assert nacre.memory.stats().peak - before < 4 * rows * classes / 2
    assert all(result.isfinite().all() for result in found)


# ---- gradients formed by the forward


def leaves(rows=7, features=5, classes=30):
    x, w, b, target = drawn(rows, features, classes)
    return [tensor.requires_grad_() for tensor in (x, w, b)], target


def test_a_graph_that_is_kept_gives_its_gradients_again():
    given, target = leaves()
    loss = ours(*given, target)
    first = torch.autograd.grad(3 * loss, given, retain_graph=True)
    second = torch.autograd.grad(3 * loss, given, retain_graph=True)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    for gradient in second:
        gradient.zero_()  # a gradient is its taker's to change
    last = torch.autograd.grad(3 * loss, given)
    assert all(torch.equal(one, two) for one, two in zip(first, last, strict=True))


def test_gradients_accumulate():
    given, target = leaves()
    single = torch.autograd.grad(ours(*given, target), given)
    for _ in range(3):
        ours(*given, target).backward()
    for leaf, gradient in zip(given, single, strict=True):
        torch.testing.assert_close(leaf.grad, 3 * gradient, rtol=1e-6, atol=0)  # float32: two sums instead of a product


@pytest.mark.usual_algorithms
def test_a_last_backward_takes_no_new_memory():
    given, target = leaves(64, 300, 1000)
    loss = ours(*given, target)
    saved = nacre.memory.stats().used
    nacre.memory.reset_peak()
    loss.backward()
    assert nacre.memory.stats().peak == saved


def test_only_what_is_asked_for_is_formed():
    x, w, b, target = drawn(6, 3, 20)
    weight = torch.ones(20)

    def kept(x, w, b, **keywords):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.shape) or t, lambda t: t):
            ours(x, w, b, target, **keywords)
        return sizes[-3:]

    none = torch.Size([0])
    for asked in itertools.product([False, True], repeat=3):
        given = [tensor.detach().requires_grad_(ask) for tensor, ask in zip((x, w, b), asked, strict=True)]
        if any(asked):
            assert kept(*given) == [t.shape if ask else none for t, ask in zip(given, asked, strict=True)]
            assert kept(*given, weight=weight) == kept(*given)
            assert kept(*given, reduction="none") == [none] * 3
            with torch.autocast("cpu", torch.bfloat16):
                assert kept(*given) == [none] * 3
            assert kept(*(tensor.half() for tensor in given)) == [none] * 3
    # a gradient of the targets is never formed: the whole backward runs
    saved = [*[None] * 9, [True] * 3, *[None] * 5]
    assert _last_backward(torch.tensor(1.0), saved, [True, True, True, True, False]) is None


def test_without_gradients_none_are_formed():
    given, target = leaves(300, 64, 500)
    nacre.memory.empty_cache()
    nacre.memory.reset_peak()
    before = nacre.memory.stats().used
    with torch.no_grad():
        loss = ours(*given, target)
    # a chunk's logits and nothing as large: the pool's blocks are at most a quarter larger than what is asked for
    assert nacre.memory.stats().peak - before < 1.25 * 4 * 256 * 500 + 4 * 500 * 64
    torch.testing.assert_close(loss, torchs(*given, target).detach(), rtol=1e-5, atol=0)  # float32 sums of 500 terms


def test_a_second_derivative_follows_the_formula():
    x, w, b, target = drawn(4, 3, 5, torch.float64)
    given = [tensor.requires_grad_() for tensor in (x, w, b)]
    assert torch.autograd.gradgradcheck(lambda *t: ours(*t, target), given)


def test_what_the_formula_keeps():
    x, w, b, target = drawn(6, 3, 20)
    weight = torch.rand(20, requires_grad=True)
    calls = {
        "class indices": lambda: ours(x, w, b, torch.rand(6, 20)),
        "one place": lambda: linear_cross_entropy(x, w.view(10, 2, 3), torch.zeros(6, 2, dtype=torch.int64)),
        "without a gradient": lambda: ours(x, w, b, target, weight=weight),
        "float32 or float64": lambda: ours(x.half(), w.half(), b.half(), target),
    }
    for reason, call in calls.items():
        with torch.no_grad(), record_choices() as choices:
            call()
        assert [choice.implementation for choice in choices] == ["formula"]
        assert reason in choices[0].reason


def test_the_kernel_itself_refuses_what_does_not_fit():
    forward = torch.ops.nacre.linear_cross_entropy.kernel
    backward = torch.ops.nacre.linear_cross_entropy_backward.kernel
    x, w, b, y = drawn(4, 6, 8)
    one, none, no = torch.tensor(1.0), torch.empty(0), [False] * 3
    mean, settings = ("mean", -100, 0.0, None), (None, "mean", -100, 0.0, None)
    kept, formed, needs = (one, one, none, none, none), [True] * 3, [True] * 3 + [False] * 2
    for message, call in {
        "input .N, D.": lambda: forward(x[0], w, b, y, *settings, no),
        "linear_weight .C, D.": lambda: forward(x, w[:, :5], b, y, *settings, no),
        "one of them": lambda: forward(x, w.double(), b, y, *settings, no),
        "float32 or float64": lambda: forward(x.half(), w.half(), b, y, *settings, no),
        "at least one class": lambda: forward(x, w[:0], None, y, *settings, no),
        "one class index": lambda: forward(x, w, b, y[:2], *settings, no),
        "one class index a row": lambda: forward(x, w, b, y.int(), *settings, no),
        "one bias, and one weight": lambda: forward(x, w, b[:3], y, *settings, no),
        "and one weight, a class": lambda: forward(x, w, b, y, b[:3], *mean, no),
        "none, mean or sum": lambda: forward(x, w, b, y, None, "average", -100, 0.0, None, no),
        "a row at least": lambda: forward(x, w, b, y, None, "mean", -100, 0.0, 0, no),
        "three gradients": lambda: forward(x, w, b, y, *settings, no[:2]),
        "gradients to form or not": lambda: forward(x, w, None, y, *settings, formed),
        "of a sum or mean": lambda: forward(x, w, b, y, None, "none", -100, 0.0, None, formed),
        "the kernel serves": lambda: backward(one, x, w, b, y, *settings, no, *kept, [True] * 5),
        "linear_bias": lambda: backward(one, x, w, None, y, *settings, no, *kept, needs),
        "one gradient a loss": lambda: backward(b, x, w, b, y, *settings, no, *kept, needs),
        "its argument's shape": lambda: backward(one, x, w, b, y, *settings, formed, *kept, needs),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call()
    with pytest.raises(IndexError, match="Target 8 is out of bounds"):
        forward(x, w, b, y.new_full((4,), 8), *settings, no)
