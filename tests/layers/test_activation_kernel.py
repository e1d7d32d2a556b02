"""The C++ kernel of the activations: how exact it is, memory of any layout and size, threads, what it refuses."""

import pytest
import torch

from nacre.core import native
from nacre.core.choice import record_choices
from tests.layers.test_activation import FLOATS, NACRE, TORCH, every
from tests.support import assert_as_good_as_torch

# around a vector of 4, 8 or 16 values and around four of them, primes, and a part and more of a thread's share
SIZES = [1, 2, 3, 15, 16, 17, 63, 64, 65, 509, 1023, 4095, 4097, 70_001]
dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=str)

pytestmark = pytest.mark.skipif(native.unavailable() != "", reason="the kernels were not built")


def results(function, input, grad):
    leaf = input.detach().requires_grad_()
    output = function(leaf)
    return output.detach(), *torch.autograd.grad(output, leaf, grad)


def kernel_results(name, input, grad):
    with record_choices() as choices:
        found = results(NACRE[name], input, grad)
    assert [choice.implementation for choice in choices] == ["C++ kernel", "C++ kernel"]
    return found


@every
@dtypes
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_error_is_at_most_twice_torchs(name, dtype, scale):
    for size in SIZES:
        input, grad = (torch.randn(size) * scale).to(dtype), torch.randn(size).to(dtype)
        ours, torchs = kernel_results(name, input, grad), results(TORCH[name], input, grad)
        judges = results(TORCH[name], input.double(), grad.double())
        for one, two, judge in zip(ours, torchs, judges, strict=True):
            assert_as_good_as_torch(one, two, judge, dtype, f"{name} of {size}")


@pytest.mark.parametrize("name", ["gelu", "gelu, tanh"])
def test_largest_error_of_gelu(name):
    input = torch.linspace(-15, 15, 1_000_003)
    grad = torch.ones_like(input)
    ours, judges = kernel_results(name, input, grad), results(TORCH[name], input.double(), grad.double())
    for one, judge in zip(ours, judges, strict=True):
        # a few roundings of a number as large as the result, or as the 1 from which a small one is subtracted
        assert ((one - judge).abs() <= 3e-7 * judge.abs().clamp(min=1)).all()


def channels_last(made):
    return made(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)


LAYOUTS = {
    "contiguous": lambda made: made(2, 3, 4, 5),
    "channels_last": channels_last,
    "one image of many": lambda made: (
        made(6, 3, 4, 5).contiguous(memory_format=torch.channels_last)[::2][1:2].expand(2, 3, 4, 5)
    ),
    "permuted": lambda made: made(5, 4, 2, 3).permute(2, 3, 1, 0),
    "sliced": lambda made: made(2, 3, 4, 10)[..., ::2],
    "sliced channels_last": lambda made: channels_last(lambda *_: made(2, 3, 8, 5))[:, :, ::2],
    "expanded": lambda made: made(2, 1, 4, 1).expand(2, 3, 4, 5),
    "a sum's gradient": lambda made: made(()).expand(2, 3, 4, 5),
    "unaligned": lambda made: made(121)[1:].view(2, 3, 4, 5),
    "negative in name only": lambda made: torch._neg_view(made(2, 3, 4, 5)),
}


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_of_any_layout(name, layout, dtype):
    input = LAYOUTS[layout](torch.randn).to(dtype)
    for grad_layout, make in LAYOUTS.items():
        grad = make(torch.randn).to(dtype)
        ours, torchs = kernel_results(name, input, grad), results(TORCH[name], input, grad)
        plain = kernel_results(name, *(t.resolve_neg().contiguous() for t in (input, grad)))
        for one, two, three in zip(ours, torchs, plain, strict=True):
            assert torch.equal(one, three), grad_layout
            assert one.stride() == two.stride(), grad_layout


@every
@pytest.mark.parametrize("shape", [(0,), (0, 6), (2, 0, 3, 4)])
def test_no_elements(name, shape):
    for ours, torchs in zip(
        kernel_results(name, torch.randn(shape), torch.randn(shape)),
        results(TORCH[name], torch.randn(shape), torch.randn(shape)),
        strict=True,
    ):
        assert (ours.shape, ours.stride()) == (torchs.shape, torchs.stride())


@pytest.mark.usual_algorithms
@every
@dtypes
def test_same_bits_for_any_number_of_threads(name, dtype):
    input, grad = torch.randn(100_003).to(dtype), torch.randn(100_003).to(dtype)
    found = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        found.append(kernel_results(name, input, grad))
    for output, gradient in found[1:]:
        assert torch.equal(output, found[0][0]) and torch.equal(gradient, found[0][1])


@dtypes
def test_results_larger_than_the_cache(dtype):
    """They are stored past it, in the same bits."""
    count = 2**25 // dtype.itemsize + 4099
    input = torch.randn(count).to(dtype)
    part = slice(count - 5000, None)
    for name in ("gelu", "relu"):
        large, small = kernel_results(name, input, input), kernel_results(name, input[part], input[part])
        for one, two in zip(large, small, strict=True):
            assert torch.equal(one[part], two)
            assert not one.isnan().any()


@every
def test_what_is_wrong_raises(name):
    operator, approximate = name.partition(", ")[0], [name.partition(", ")[2] or "none"] * name.startswith("gelu")
    backward = getattr(torch.ops.nacre, f"{operator}_backward").kernel
    values = torch.ones(3, 4)
    for grad, saved, needs in [
        (torch.ones(3, 5), values, [True]),
        (torch.ones(12), values, [True]),
        (values.double(), values, [True]),
        (values, values, [True, True]),
        (values.int(), values.int(), [True]),
    ]:
        with pytest.raises(RuntimeError):
            backward(grad, saved, *approximate, needs)
