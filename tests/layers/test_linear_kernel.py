"""The C++ kernel of Linear: sizes around its tiles, panels and blocks, any layout, threads, what it refuses."""

import pytest
import torch
import torch.nn.functional as F

import nacre
from nacre.core import native
from nacre.core.choice import record_choices
from tests.support import assert_as_good_as_torch

pytestmark = pytest.mark.skipif(native.unavailable() != "", reason="the kernels were not built")

# N, D, E: around a tile of 6 rows, vectors of 4, 8 and 16, panels of 64, a depth block of 384 and a left factor of
# 131,072 values (above, all threads pack the right factor together), few rows of many features (whose result is made
# transposed), primes, nothing at all
SHAPES = [
    (1, 1, 1), (5, 2, 3), (6, 15, 16), (7, 17, 15), (13, 63, 65), (65, 64, 63), (3, 1023, 17), (1023, 3, 5),
    (2, 383, 129), (12, 385, 64), (97, 769, 31), (400, 400, 50), (521, 389, 67),
    (9, 67, 131), (15, 1023, 193), (64, 770, 400), (131, 1040, 1031),
    (200, 801, 1700), (0, 5, 3), (4, 0, 3), (4, 5, 0),
]  # fmt: skip


def results(function, input, weight, bias, grad):
    leaves = [tensor.detach().requires_grad_() for tensor in (input, weight, bias)]
    output = function(*leaves)
    return output.detach(), *torch.autograd.grad(output, leaves, grad)


def kernel_results(*tensors):
    with record_choices() as choices:
        found = results(nacre.functional.linear, *tensors)
    assert [choice.implementation for choice in choices] == ["C++ kernel", "C++ kernel"]
    return found


def drawn(rows, in_features, out_features, dtype=torch.float32):
    shapes = (rows, in_features), (out_features, in_features), (out_features,), (rows, out_features)
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_at_most_twice_torchs(shape, dtype):
    tensors = drawn(*shape, dtype)
    found = zip(kernel_results(*tensors), results(F.linear, *tensors), strict=True)
    judges = results(F.linear, *(tensor.double() for tensor in tensors))
    for (ours, torchs), judge in zip(found, judges, strict=True):
        assert ours.shape == torchs.shape and (ours.numel() == 0 or ours.stride() == torchs.stride())
        assert_as_good_as_torch(ours, torchs, judge, dtype, f"linear of {shape}")


def test_a_right_factor_packed_in_parts():
    """Wider than what is packed at a time: small integers, where every sum is exact."""
    rows, in_features, out_features = 400, 384, 5600
    tensors = [torch.randint(-2, 3, tensor.shape).float() for tensor in drawn(rows, in_features, out_features)]
    judges = results(F.linear, *(tensor.double() for tensor in tensors))
    for ours, judge in zip(kernel_results(*tensors), judges, strict=True):
        assert torch.equal(ours.double(), judge)


@pytest.mark.parametrize("rows", range(1, 10))
@pytest.mark.parametrize(("in_features", "out_features"), [(1, 17), (15, 1), (63, 65), (131, 7), (1023, 40)])
def test_few_rows_are_exact_too(rows, in_features, out_features):
    tensors = [torch.randint(-2, 3, tensor.shape).float() for tensor in drawn(rows, in_features, out_features)]
    judges = results(F.linear, *(tensor.double() for tensor in tensors))
    for ours, judge in zip(kernel_results(*tensors), judges, strict=True):
        assert torch.equal(ours.double(), judge)


LAYOUTS = {
    "unaligned": lambda tensor: torch.cat([torch.zeros(1), tensor.flatten()])[1:].view(tensor.shape),
    "transposed": lambda tensor: tensor.t().contiguous().t(),
    "every second": lambda tensor: tensor.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda tensor: tensor[:1].expand(tensor.shape),
    "one number": lambda tensor: tensor.flatten()[0].expand(tensor.shape),
}


@pytest.mark.parametrize("rows", [37, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["input", "weight", "grad"])
def test_any_layout(which, layout, rows):
    tensors = dict(zip(("input", "weight", "bias", "grad"), drawn(rows, 43, 29), strict=True))
    tensors[which] = LAYOUTS[layout](tensors[which])
    dense = results(F.linear, *(tensor.double().contiguous() for tensor in tensors.values()))
    for ours, judge in zip(kernel_results(*tensors.values()), dense, strict=True):
        torch.testing.assert_close(ours.double(), judge, rtol=0, atol=2e-5)  # sums of 43 products of about 1


@pytest.mark.parametrize(
    "shape", [(64, 784, 300), (523, 300, 401), (4100, 20, 33), (1, 1023, 701), (7, 640, 515)], ids=str
)
def test_same_bits_for_any_number_of_threads(shape):
    tensors = drawn(*shape)
    torch.set_num_threads(1)
    expected = kernel_results(*tensors)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        for one, other in zip(kernel_results(*tensors), expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("frozen", ["input", "weight", "bias"])
def test_only_the_gradients_asked_for(frozen):
    names = ("input", "weight", "bias")
    *tensors, grad = drawn(70, 40, 50)
    expected = dict(zip(names, kernel_results(*tensors, grad)[1:], strict=True))
    leaves = {name: tensor.requires_grad_(name != frozen) for name, tensor in zip(names, tensors, strict=True)}
    nacre.functional.linear(**leaves).backward(grad)
    for name, leaf in leaves.items():
        assert leaf.grad is None if name == frozen else torch.equal(leaf.grad, expected[name])


def test_the_bias_alone():
    input, weight, bias, grad = drawn(700, 40, 50)
    nacre.functional.linear(input, weight, bias.requires_grad_()).backward(grad)
    torch.testing.assert_close(bias.grad.double(), grad.double().sum(0), rtol=0, atol=4e-5)  # sums of 700


def test_infinities_and_nan_stay_in_their_rows():
    input, weight, bias, _ = drawn(9, 20, 70)
    expected = nacre.functional.linear(input, weight, bias)
    input[3, 5], input[7, 0] = torch.inf, torch.nan
    output = nacre.functional.linear(input, weight, bias)
    others = [row for row in range(9) if row not in (3, 7)]
    assert torch.equal(output[others], expected[others])
    assert output[3].isinf().all() and output[7].isnan().all()


@pytest.mark.usual_sizes
@pytest.mark.parametrize(
    ("shape", "implementation"),
    [
        ((64, 64, 64), "torch"),
        ((1, 64, 64), "torch"),
        ((1, 784, 500), "C++ kernel"),
        ((20_000, 70, 7), "torch"),
        ((64, 784, 300), "C++ kernel"),
    ],
    ids=str,
)
def test_who_runs_which_sizes(shape, implementation):
    input, weight, bias, _ = drawn(*shape)
    with record_choices() as choices:
        nacre.functional.linear(input, weight, bias)
    assert [choice.implementation for choice in choices] == [implementation]


@pytest.mark.parametrize("arguments", [
    (torch.zeros(2, 3), torch.zeros(4, 5), None),
    (torch.zeros(2, 3), torch.zeros(3), None),
    (torch.zeros(()), torch.zeros(4, 3), None),
    (torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(3)),
    (torch.zeros(2, 3), torch.zeros(4, 3).double(), None),
    (torch.zeros(2, 3).bfloat16(), torch.zeros(4, 3).bfloat16(), None),
], ids=["features", "weight of one dimension", "a number", "bias", "dtypes", "bfloat16"])  # fmt: skip
def test_the_kernel_itself_refuses_what_does_not_fit(arguments):
    with pytest.raises(RuntimeError, match="linear: "):
        torch.ops.nacre.linear.kernel(*arguments)


def test_the_backward_kernel_refuses_what_does_not_fit():
    input, weight = torch.zeros(2, 3), torch.zeros(4, 3)
    for grad, needs in [(torch.zeros(2, 3), [True] * 3), (torch.zeros(2, 4), [True]), (torch.zeros(4, 2), [True] * 3)]:
        with pytest.raises(RuntimeError, match="linear: "):
            torch.ops.nacre.linear_backward.kernel(grad, input, weight, needs)
