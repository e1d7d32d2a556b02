"""What is special to LayerNorm: how exact its kernel is at every size and dtype, memory of any layout, bad input."""

import pytest
import torch
from torch.nn.functional import layer_norm as torchs_layer_norm

import nacre
from nacre.core import native
from nacre.core.choice import record_choices
from nacre.functional import layer_norm
from tests.support import assert_as_good_as_torch

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# around a vector of 4, 8 or 16 values and around four of them, primes, and what models use
SIZES = [1, 2, 15, 16, 17, 63, 64, 65, 127, 509, 768, 1023]


def results(function, input, weight, bias, grad):
    """Output and gradients of one call over the last dimension."""
    leaves = [t if t is None else t.detach().requires_grad_() for t in (input, weight, bias)]
    output = function(leaves[0], input.shape[-1:], leaves[1], leaves[2])
    return [output.detach(), *torch.autograd.grad(output, [leaf for leaf in leaves if leaf is not None], grad)]


def kernel_results(*tensors):
    with record_choices() as choices:
        found = results(layer_norm, *tensors)
    if not native.unavailable():
        assert [choice.implementation for choice in choices] == ["C++ kernel", "C++ kernel"]
    return found


def root_mean_square(values):
    return values.square().mean().sqrt().item()


@pytest.mark.parametrize("offset", [0, 100])
@pytest.mark.parametrize("parameters", ["", "weight", "bias", "weight bias", "float32 weight bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_error_is_at_most_twice_torchs(size, dtype, parameters, offset):
    kind = torch.float32 if "float32" in parameters and dtype.itemsize == 2 else dtype
    input = (torch.randn(307, size) + offset).to(dtype)
    weight = torch.randn(size).to(kind) if "weight" in parameters else None
    bias = torch.randn(size).to(kind) if "bias" in parameters else None
    grad = torch.randn(307, size).to(dtype)
    ours = kernel_results(input, weight, bias, grad)
    torchs = results(torchs_layer_norm, input, weight, bias, grad)
    exact = results(torchs_layer_norm, *(t if t is None else t.double() for t in (input, weight, bias, grad)))
    for one, two, judge in zip(ours, torchs, exact, strict=True):
        assert (one.dtype, one.shape, one.stride()) == (two.dtype, two.shape, two.stride())
        error, torchs_error = root_mean_square(one.double() - judge), root_mean_square(two.double() - judge)
        # a row of one or two features, these nearly equal, has rstd = 1 / sqrt(eps) = 316, which enlarges the rounding
        # of a mean as large as the offset; in float64, where torch is its own judge, what torch cancels carries rstd^2
        enlarged = {torch.float64: 1 / 1e-5}.get(dtype, 316 if size <= 2 else 0)
        precision = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        slack = enlarged * (1 + offset) * precision * max(root_mean_square(judge), 1.0)
        assert error <= 2 * torchs_error + slack


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_large_mean_does_not_swallow_the_variance(dtype):
    # E[x^2] - E[x]^2 would lose all of it: 4096^2 + 1 is 4096^2 in float32
    input = 4096 + torch.tensor([[-32.0, 32.0] * 24, [-64.0, 64.0] * 24]).to(dtype)
    output = layer_norm(input, (48,))
    torch.testing.assert_close(output, torch.tensor([[-1.0, 1.0] * 24] * 2).to(dtype), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_of_any_layout(dtype):
    def unaligned(*shape):
        return torch.randn(torch.Size(shape).numel() + 1).to(dtype)[1:].view(shape)

    inputs = {
        "unaligned": unaligned(5, 33),
        "a window": torch.randn(5, 40).to(dtype)[:, 3:36],
        "every second": torch.randn(5, 66).to(dtype)[:, ::2],
        "transposed": torch.randn(33, 5).to(dtype).T,
        "permuted": torch.randn(4, 5, 33).to(dtype).permute(1, 0, 2),
        "one row for all": torch.randn(1, 33).to(dtype).expand(5, 33),
        "backwards in the graph's eyes": torch.randn(5, 33, dtype=torch.complex64).conj().imag.to(torch.float32),
    }
    weight, bias = unaligned(33), unaligned(33)
    for layout, input in inputs.items():
        if layout.startswith("backwards"):
            assert input.is_neg()  # the stored numbers are the negatives of the values
            input = input if dtype is torch.float32 else input.to(dtype)
        grad = torch.randn(input.shape[::-1]).to(dtype).permute(*range(input.dim() - 1, -1, -1))
        plain = [t.clone(memory_format=torch.contiguous_format).resolve_neg() for t in (input, weight, bias, grad)]
        for one, two in zip(kernel_results(input, weight, bias, grad), kernel_results(*plain), strict=True):
            assert torch.equal(one, two), layout
            assert one.is_contiguous()


def test_rows_that_are_not_finite_stay_apart():
    input = torch.randn(5, 19)
    input[1, 3], input[2, 18], input[3, 0] = torch.inf, torch.nan, -torch.inf
    weight, grad = torch.randn(19), torch.randn(5, 19)
    ours = kernel_results(input, weight, None, grad)
    torchs = results(torchs_layer_norm, input, weight, None, grad)
    for one, two in zip(ours, torchs, strict=True):
        assert torch.equal(one.isnan(), two.isnan())
    # the finite rows as without the others; float32 sums of 19 values in another order
    torch.testing.assert_close(ours[0][[0, 4]], torchs[0][[0, 4]], rtol=1e-5, atol=1e-6)


def test_equal_values_become_the_bias():
    bias = torch.randn(7)
    for value in (0.0, 0.1, -1e6, 1e-30):
        # the mean of equal values may round, by less than their spacing, which 1 / sqrt(eps) then enlarges
        atol = 316 * abs(value) * torch.finfo(torch.float32).eps
        torch.testing.assert_close(
            layer_norm(torch.full((3, 7), value), (7,), None, bias), bias.expand(3, 7), rtol=0, atol=atol
        )


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6), (3, 0)])
def test_nothing_to_normalise(shape):
    input, weight, bias = torch.randn(shape), torch.randn(shape[-1:]), torch.randn(shape[-1:])
    ours = kernel_results(input, weight, bias, torch.randn(shape))
    for one, two in zip(ours, results(torchs_layer_norm, input, weight, bias, torch.randn(shape)), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("needs", [[True, False, False], [False, True, False], [False, False, True], [False] * 3])
def test_only_the_gradients_asked_for(needs):
    input, weight, grad = torch.randn(9, 21), torch.randn(21), torch.randn(9, 21)
    _, mean, rstd = torch.ops.nacre.layer_norm(input, [21], weight, None, 1e-5)
    backward = torch.ops.nacre.layer_norm_backward
    some = backward(grad, input, [21], weight, mean, rstd, needs)
    every = backward(grad, input, [21], weight, mean, rstd, [True] * 3)
    for needed, one, two in zip(needs, some, every, strict=True):
        assert (one is not None) == needed
        assert one is None or torch.equal(one, two)


def test_the_kernel_itself_refuses_what_does_not_fit():
    if reason := native.unavailable():
        pytest.skip(reason)
    forward, backward = torch.ops.nacre.layer_norm.kernel, torch.ops.nacre.layer_norm_backward.kernel
    x, statistic = torch.randn(4, 6), torch.randn(4, 1)
    all_three = [True, True, True]
    for message, call in {
        "last dimensions": lambda: forward(x, [5], None, None, 1e-5),
        "fewer dimensions": lambda: forward(x, [1, 4, 6], None, None, 1e-5),
        "weight and bias": lambda: forward(x, [6], torch.ones(5), None, 1e-5),
        "float32, float64": lambda: forward(x.int(), [6], None, None, 1e-5),
        "shape of the output": lambda: backward(x[:2], x, [6], None, statistic, statistic, all_three),
        "one mean": lambda: backward(x, x, [6], None, statistic[:2], statistic, all_three),
        "three gradients": lambda: backward(x, x, [6], None, statistic, statistic, [True]),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call()


# an image or a volume normalised as a whole: rounding errors of one plain sum would grow with its length
def test_rows_of_millions():
    size = 3_000_017
    tensors = torch.rand(1, size), torch.rand(size), torch.rand(size), torch.rand(1, size)
    ours = kernel_results(*tensors)
    torchs = results(torchs_layer_norm, *tensors)
    judge = results(torchs_layer_norm, *(tensor.double() for tensor in tensors))
    for name, *three in zip(("output", "x", "weight", "bias"), ours, torchs, judge, strict=True):
        assert_as_good_as_torch(*three, torch.float32, name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(4, 256), (512,)), "Did you mean LayerNorm\\(256\\)"),
        ((torch.ones(256), (4, 256)), "normalises the last 2 dimensions"),
        ((torch.ones(4, 6), ()), "at least one dimension"),
        ((torch.ones(4, 6), (6,), torch.ones(5)), "weight of layer_norm has the shape"),
        ((torch.ones(4, 6), (6,), None, torch.ones(1, 6)), "bias of layer_norm has the shape"),
        ((torch.ones(4, 6), (6,), torch.ones(6).double()), "one dtype"),
        ((torch.ones(4, 6, dtype=torch.float64), (6,), torch.ones(6)), "one dtype"),
    ],
)
def test_bad_input_raises_as_torch_does(arguments, message):
    with pytest.raises(RuntimeError):
        torchs_layer_norm(*arguments)
    with pytest.raises(RuntimeError, match=message):
        layer_norm(*arguments)


def test_integers_are_torchs_to_refuse():
    with pytest.raises(RuntimeError, match="not implemented"):
        layer_norm(torch.ones(4, 6, dtype=torch.int64), (6,))


@pytest.mark.parametrize("layers", [nacre, torch.nn], ids=["nacre", "torch.nn"])
def test_the_bill_of_what_is_frozen(layers):
    # 24 elements: n (2), g w (1), dx (7), dw (2), db (1), and two divisions for each of the 4 rows; g, x and dx are 24
    # numbers each, w, dw and db 6, the statistics 8
    for frozen, gradient, flops, numbers in (
        ("", True, 24 * 13 + 8, 72 + 18 + 8),
        ("bias", True, 24 * 12 + 8, 72 + 12 + 8),
        ("weight", True, 24 * 11 + 8, 72 + 12 + 8),
        ("weight bias", True, 24 * 10 + 8, 72 + 6 + 8),
        ("", False, 24 * 5, 48 + 12 + 8),
        ("weight", False, 24, 24 + 6),
        ("weight bias", False, 0, 0),
    ):
        layer = layers.LayerNorm(6)
        for name in frozen.split():
            layer.get_parameter(name).requires_grad_(False)
        bill = nacre.cost(layer, torch.randn(4, 6, requires_grad=gradient))
        assert (bill.backward_elementwise_flops, bill.backward_bytes) == (flops, 4 * numbers), (frozen, gradient)


class Functional(torch.nn.Module):
    """Layer or group normalisation of given weights, by a function."""

    def __init__(self, layer, function, given):
        super().__init__()
        self.layer, self.function, self.given = layer, function, given

    def forward(self, input):
        return self.function(input, self.given, self.layer.weight, self.layer.bias)


@pytest.mark.parametrize("frozen", ["", "bias", "weight", "weight bias"])
def test_the_bill_of_what_is_frozen_and_normalised_by_a_function(frozen):
    images = torch.randn(4, 6, 1, 1, requires_grad=True)
    for layer, function, given, input in (
        (torch.nn.LayerNorm(6), torchs_layer_norm, (6,), torch.randn(4, 6, requires_grad=True)),
        (torch.nn.LayerNorm(6), layer_norm, (6,), torch.randn(4, 6, requires_grad=True)),
        (torch.nn.GroupNorm(1, 6), torch.nn.functional.group_norm, 1, images),  # the rows and features of those above
    ):
        model = Functional(layer, function, given)
        without = nacre.cost(model.requires_grad_(False), input)
        assert without.backward_elementwise_flops == 24 * 10 + 8
        for name in ("weight", "bias"):
            layer.get_parameter(name).requires_grad_(name not in frozen.split())
        bill, asked = nacre.cost(model, input), (layer.weight.requires_grad, layer.bias.requires_grad)
        assert bill.backward_elementwise_flops == without.backward_elementwise_flops + 24 * (2 * asked[0] + asked[1])
        assert bill.backward_bytes == without.backward_bytes + 4 * 6 * sum(asked)


def test_the_bill_of_a_frozen_norm_in_one_pass_with_a_sum():
    # as above, with mean and variance again (4 an element and a row), the gradient of the sum (1) and, of the branch
    # that drops, 4
    inputs = [torch.randn(4, 6, requires_grad=True) for _ in range(2)]
    layer = nacre.ResidualDropoutLayerNorm(6)
    spec = nacre.blocks.BLOCKS["residual_dropout_layer_norm"]
    trained = spec.cost(**spec.sizes(layer, *inputs))
    frozen = spec.cost(**spec.sizes(layer.requires_grad_(False), *inputs))
    assert trained.backward_elementwise_flops == 24 * (13 + 4 + 1 + 4) + 4 * (2 + 4)
    assert frozen.backward_elementwise_flops == trained.backward_elementwise_flops - 24 * 3
    assert frozen.backward_bytes == trained.backward_bytes - 4 * 12
    assert frozen.saved_bytes == trained.saved_bytes == 4 * 24 + 8
    assert spec.cost(**spec.sizes(layer, *(tensor.detach() for tensor in inputs))).saved_bytes == 0
