"""The kernels of Conv2d: which of them runs, how exact they are, memory of any layout, threads, what they refuse."""

import itertools
import random

import pytest
import torch
from torch.nn.functional import conv2d as torchs_conv2d
from torch.nn.functional import pad

import nacre
from nacre.core import native
from nacre.core.choice import record_choices
from tests.support import assert_as_good_as_torch

pytestmark = pytest.mark.skipif(native.unavailable() != "", reason="the kernels were not built")

# around a vector of 4, 8 or 16 values and around several of them
SIZES = (1, 2, 3, 7, 15, 16, 17, 31, 33, 49, 65)


def random_depthwise(draw):
    """Numbers of one depthwise convolution, drawn freely but for a kernel that fits."""
    while True:
        channels, taps = draw.choice((1, 2, 5, 17)), (draw.randint(1, 7), draw.randint(1, 7))
        stride, dilation = ([draw.choice(numbers) for _ in "pq"] for numbers in ((1, 1, 2, 3), (1, 1, 2, 3)))
        margins = [draw.choice((0, 0, 1, 2, 3, 9)) for _ in range(4)]
        height, width = draw.choice(SIZES), draw.choice(SIZES)
        fits = (
            height + margins[2] + margins[3] > (taps[0] - 1) * dilation[0]
            and width + margins[0] + margins[1] > (taps[1] - 1) * dilation[1]
        )
        if fits:
            weight = (channels * draw.choice((1, 1, 2, 3)), 1, *taps)
            return (draw.choice((1, 2, 5)), channels, height, width), weight, stride, margins, dilation, channels


def random_few_channels(draw):
    """The same for few input channels, with kernels that fill vectors well or badly."""
    shape, (_, _, *taps), *numbers, _ = random_depthwise(draw)
    channels, kernels = draw.choice((1, 2, 3, 4, 8, 31)), draw.choice((1, 5, 8, 12, 16, 17, 33, 70))
    return (shape[0], channels, *shape[2:]), (kernels, channels, *taps), *numbers, 1


POINTWISE = ([1, 1], [0, 0, 0, 0], [1, 1], 1)
PLANES, LAST = torch.contiguous_format, torch.channels_last


def results(function, tensors, grad=None):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = function(*leaves)
    grad = torch.ones_like(output) if grad is None else grad
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def own_results(tensors, numbers, grad):
    with record_choices() as choices:
        found = results(lambda *leaves: torch.ops.nacre.conv2d(*leaves, *numbers), tensors, grad)
    assert [choice.implementation for choice in choices] == expected_kernels(*tensors[:2], numbers), choices
    return found


def expected_kernels(input, weight, numbers):
    few = 1 < weight.shape[1] <= 31 and tuple(numbers) != POINTWISE
    if few and (not input.is_contiguous() or max(numbers[0]) > 2):
        return ["torch kernel", "C++ kernel"]
    return ["C++ kernel", "C++ kernel"]


def torchs_results(tensors, numbers, grad):
    stride, margins, dilation, groups = numbers

    def function(input, weight, bias):
        return torchs_conv2d(pad(input, margins), weight, bias, stride, 0, dilation, groups)

    return results(function, tensors, grad)


def assert_good(tensors, numbers):
    grad = torch.randn_like(torchs_conv2d(pad(tensors[0], numbers[1]), tensors[1], None, numbers[0], 0, *numbers[2:]))
    ours, torchs = own_results(tensors, numbers, grad), torchs_results(tensors, numbers, grad)
    judges = torchs_results([tensor.double() for tensor in tensors], numbers, grad.double())
    for name, one, two, judge in zip(("output", "input", "weight", "bias"), ours, torchs, judges, strict=True):
        assert_as_good_as_torch(one, two, judge, tensors[0].dtype, f"{name} of {tensors[0].shape}, {numbers}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_depthwise_error_is_at_most_twice_torchs(seed, dtype):
    draw = random.Random(seed)
    for _ in range(60):
        shape, weight_shape, *numbers = random_depthwise(draw)
        assert_good([torch.randn(size, dtype=dtype) for size in (shape, weight_shape, weight_shape[:1])], numbers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_few_channels_error_is_at_most_twice_torchs(format, dtype):
    draw = random.Random(0)
    for _ in range(60):
        shape, weight_shape, *numbers = random_few_channels(draw)
        tensors = [torch.randn(size, dtype=dtype) for size in (shape, weight_shape, weight_shape[:1])]
        tensors[0] = tensors[0].contiguous(memory_format=format)
        assert_good(tensors, numbers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_few_kernels_of_many_channels_error_is_at_most_twice_torchs(dtype):
    for channels, kernels, taps, dilation in ((32, 24, 3, 1), (67, 3, 3, 2), (40, 1, 5, 1), (129, 17, 2, 1)):
        tensors = [torch.randn(2, channels, 17, 33), torch.randn(kernels, channels, taps, taps), torch.randn(kernels)]
        assert_good([tensor.to(dtype) for tensor in tensors], ([1, 1], [1, 0, 2, 1], [dilation] * 2, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("samples", [1, 2, 9, 19])
def test_pointwise_error_is_at_most_twice_torchs(samples, format, dtype):
    for channels, kernels, height, width in (
        (2, 1, 1, 1),
        (3, 17, 2, 31),
        (65, 5, 7, 7),
        (33, 64, 15, 9),
        (5, 7, 1, 509),
    ):
        shapes = ((samples, channels, height, width), (kernels, channels, 1, 1), (kernels,))
        tensors = [torch.randn(shape, dtype=dtype) for shape in shapes]
        tensors[0] = tensors[0].contiguous(memory_format=format)
        assert_good(tensors, POINTWISE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_winograd_error_is_at_most_twice_torchs(dtype):
    draw = random.Random(0)
    for _ in range(25):
        channels, kernels, samples = draw.choice((33, 40, 65)), draw.choice((25, 37, 67)), draw.choice((1, 2, 5))
        margins = [draw.choice((0, 1, 1, 2, 5)) for _ in range(4)]
        size = [draw.choice((3, 4, 7, 16, 17, 33)) for _ in "hw"]
        shapes = ((samples, channels, *size), (kernels, channels, 3, 3), (kernels,))
        assert_good([torch.randn(shape, dtype=dtype) for shape in shapes], ([1, 1], margins, [1, 1], 1))


@pytest.mark.parametrize("channels", [128, 256])
def test_winograd_error_over_many_channels(channels):
    """Of values that do not cancel, as behind a ReLU, and over rows of tiles that no vector and no group fits."""
    tensors = [torch.rand(2, channels, 14, 70), torch.randn(channels, channels, 3, 3), torch.randn(channels)]
    assert_good(tensors, ([1, 1], [1] * 4, [1, 1], 1))


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("which", [0, 1], ids=["input", "gradient"])
def test_values_that_are_not_finite_stay_in_winograds_tiles(which, value):
    tensors = [torch.randn(2, 33, 10, 37), torch.randn(26, 33, 3, 3), torch.randn(26)]
    for place in ((0, 1, 4, 8), (1, 8, 0, 36), (1, 3, 9, 5)):
        values, grad = [tensor.clone() for tensor in tensors], torch.randn(2, 26, 10, 37)
        (grad if which else values[0])[place] = value
        found = own_results(values, ([1, 1], [1] * 4, [1, 1], 1), grad)
        expected = results(lambda *leaves: torchs_conv2d(*leaves, padding=1), values, grad)
        for one, other in zip(found, expected, strict=True):
            # float32, sums of hundreds of products in another order
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("taps", [3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_of_several_threads_shares(taps, stride):
    tensors = [torch.randn(3, 7, 57, 65), torch.randn(14, 1, taps, taps), torch.randn(14)]
    assert_good(tensors, ([stride] * 2, [taps // 2] * 4, [1, 1], 7))


LAYOUTS = {
    "unaligned": lambda made: made(2 * 3 * 9 * 10 + 1)[1:].view(2, 3, 9, 10),
    "transposed": lambda made: made(2, 3, 10, 9).transpose(2, 3),
    "strided": lambda made: made(2, 3, 9, 20)[..., ::2],
    "every second channel": lambda made: made(2, 6, 9, 10)[:, ::2],
    "expanded": lambda made: made(2, 1, 9, 10).expand(2, 3, 9, 10),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_of_any_layout(layout):
    numbers = ([1, 2], [1, 1, 1, 1], [1, 1], 3)
    input = LAYOUTS[layout](torch.randn)
    weight, bias = torch.randn(3, 1, 3, 6)[..., ::2], torch.randn(6)[::2]
    grad = torch.randn(1, 3, 9, 1).expand(2, 3, 9, 5)
    found = own_results([input, weight, bias], numbers, grad)
    expected = own_results([input.contiguous(), weight.contiguous(), bias.contiguous()], numbers, grad.contiguous())
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize(
    ("groups", "kernels", "format"), [(1, 3, PLANES), (3, 3, PLANES), (1, 32, PLANES), (1, 32, LAST)]
)
def test_values_that_are_not_finite_stay_where_they_are(value, groups, kernels, format):
    tensors = [torch.randn(2, 3, 9, 17), torch.randn(kernels, 3 // groups, 3, 3), torch.randn(kernels)]
    tensors[0] = tensors[0].contiguous(memory_format=format)
    grad = torch.randn(2, kernels, 9, 17)
    tensors[0][0, 1, 4, 8] = tensors[0][1, 1, 5, 16] = value
    numbers = ([1, 1], [1, 1, 1, 1], [1, 1], groups)
    found, expected = own_results(tensors, numbers, grad), torchs_results(tensors, numbers, grad)
    for one, other in zip(found, expected, strict=True):
        # sums of hundreds of products in another order
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, equal_nan=True)
    tensors[0] = torch.randn(2, 3, 9, 17).contiguous(memory_format=format)
    tensors[0][0, 0, 0, 8] = tensors[0][1, 2, 5, 16] = value  # beside the margins
    found, expected = own_results(tensors, numbers, grad), torchs_results(tensors, numbers, grad)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, equal_nan=True)
    tensors[0] = torch.randn(2, 3, 9, 17).contiguous(memory_format=format)
    grad[0, 2, 4, 8] = value
    found, expected = own_results(tensors, numbers, grad), torchs_results(tensors, numbers, grad)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, equal_nan=True)


def tap_by_tap(input, weight, bias, stride, groups):
    """A convolution of 3 x 3 taps and one row of padding, in which no tap meets the padding."""
    samples, _, height, width = input.shape
    split = input.unflatten(1, (groups, -1))
    output = bias[:, None, None].expand(samples, -1, (height - 1) // stride + 1, (width - 1) // stride + 1)
    for taps in itertools.product(range(3), repeat=2):
        under, margins = [], []  # of rows, of columns
        for tap, size, outputs in zip(taps, input.shape[2:], output.shape[2:], strict=True):
            read = [place * stride + tap - 1 for place in range(outputs)]
            inside = [place for place in read if 0 <= place < size]
            under.append(slice(inside[0], inside[-1] + 1, stride))
            margins.append((read.index(inside[0]), outputs - 1 - read.index(inside[-1])))
        kernels = weight[:, :, *taps].unflatten(0, (groups, -1))
        sums = torch.einsum("ngchw,gec->ngehw", split[..., *under], kernels).flatten(1, 2)
        output = output + pad(sums, margins[1] + margins[0])
    return output


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("channels", "groups", "format"), [(1, 1, PLANES), (3, 1, PLANES), (3, 1, LAST), (3, 3, PLANES)]
)
def test_weights_that_are_not_finite_do_not_meet_margins(channels, groups, format, stride, value):
    tensors = [torch.randn(2, channels, 9, 17), torch.randn(6, channels // groups, 3, 3), torch.randn(6)]
    tensors[0] = tensors[0].contiguous(memory_format=format)
    numbers = ([stride, stride], [1, 1, 1, 1], [1, 1], groups)
    grad = torch.randn_like(torchs_conv2d(*tensors, stride, 1, 1, groups))
    for places in ([], [(0, 0, 0, 0)], [(0, 0, 0, 0), (5, -1, 2, 1)]):
        for place in places:
            tensors[1][place] = value
        found = own_results(tensors, numbers, grad)
        expected = results(lambda *leaves: tap_by_tap(*leaves, stride, groups), tensors, grad)
        for one, other in zip(found, expected, strict=True):
            # float32, sums of hundreds of products in another order
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.usual_algorithms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("channels", "groups", "kernels", "taps"),
    [
        *((13, 13, 26, (5, 3)), (1, 1, 26, (5, 3)), (1, 1, 6, (5, 3)), (3, 1, 26, (5, 3)), (3, 1, 6, (5, 3))),
        *((3, 1, 26, (3, 3)), (13, 1, 26, (3, 3)), (33, 1, 26, (3, 3)), (33, 1, 5, (3, 3)), (13, 1, 26, (1, 1))),
    ],
)
def test_same_bits_for_any_number_of_threads(channels, groups, kernels, taps, dtype):
    shapes = ((9, channels, 57, 63), (kernels, channels // groups, *taps), (kernels,))
    tensors = [torch.randn(shape, dtype=dtype) for shape in shapes]
    stride = [1, 1] if channels == 33 else [2, 1]
    numbers = (stride, [1, 1, 2, 2], [1, 1], groups) if taps != (1, 1) else POINTWISE
    grad = torch.randn_like(torch.ops.nacre.conv2d(*tensors, *numbers))
    found = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        found.append(own_results(tensors, numbers, grad))
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


@pytest.mark.parametrize(("channels", "groups", "kernels"), [(3, 1, 3), (3, 1, 32), (3, 3, 3), (33, 1, 3), (33, 1, 26)])
def test_only_the_gradients_asked_for(channels, groups, kernels):
    shapes = ((2, channels, 9, 10), (kernels, channels // groups, 3, 3), (kernels,))
    input, weight, bias = (torch.randn(shape) for shape in shapes)
    numbers, grad = ([1, 1], [1, 1, 1, 1], [1, 1], groups), torch.randn(2, kernels, 9, 10)
    every = own_results([input, weight, bias], numbers, grad)[1:]
    for needs in ([True, False, False], [False, True, False], [False, False, True], [False, True, True]):
        found = torch.ops.nacre.conv2d_backward(grad, input, weight, *numbers, needs)
        for one, other, needed in zip(found, every, needs, strict=True):
            assert (one is not None) == needed
            if needed:  # torch sums a bias's gradient alone in another order
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


IMAGE, KERNEL = torch.ones(2, 6, 5, 5), torch.ones(6, 1, 3, 3)
NUMBERS = ([1, 1], [1, 1, 1, 1], [1, 1], 6)
REFUSED = {
    "three dimensions": ((IMAGE[0], KERNEL, None, *NUMBERS), "four dimensions"),
    "one stride": ((IMAGE, KERNEL, None, [1], *NUMBERS[1:]), "two strides, four paddings"),
    "stride 0": ((IMAGE, KERNEL, None, [1, 0], *NUMBERS[1:]), "out of range"),
    "negative padding": ((IMAGE, KERNEL, None, [1, 1], [0, 0, -1, 0], [1, 1], 6), "out of range"),
    "immense padding": ((IMAGE, KERNEL, None, [1, 1], [2**62, 0, 0, 0], [1, 1], 6), "out of range"),
    "dtype": ((IMAGE, KERNEL.double(), None, *NUMBERS), "one dtype"),
    "half": ((IMAGE.half(), KERNEL.half(), None, *NUMBERS), "float32 and float64"),
    "bias": ((IMAGE, KERNEL, torch.ones(5), *NUMBERS), "one value a kernel"),
    "no images": ((IMAGE[:0], KERNEL, None, *NUMBERS), "at least one image"),
    "two channels a group": (
        (IMAGE, torch.ones(6, 2, 3, 3), None, *NUMBERS[:3], 3),
        "one channel a group, kernels of one value",
    ),
    "large kernel": ((IMAGE, torch.ones(6, 1, 9, 3), None, *NUMBERS), "does not fit"),
    "groups": ((IMAGE, KERNEL, None, *NUMBERS[:3], 4), "groups divides"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_kernel_itself_refuses_what_does_not_fit(name):
    arguments, message = REFUSED[name]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.nacre.conv2d.kernel(*arguments)


def test_the_backward_itself_refuses_what_does_not_fit():
    for grad, needs, message in (
        (torch.ones(2, 6, 5, 4), [True] * 3, "shape and dtype of the output"),
        (torch.ones(2, 6, 5, 5).double(), [True] * 3, "shape and dtype of the output"),
        (torch.ones(2, 6, 5, 5), [True] * 2, "three gradients"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.nacre.conv2d_backward.kernel(grad, IMAGE, KERNEL, *NUMBERS, needs)


# ---- the choice


BY_TORCH = {
    "small depthwise images": (nacre.Conv2d(6, 6, 3, groups=6), (99, 6, 8, 8), "small images"),
    "channels last": (nacre.Conv2d(6, 6, 3, groups=6).to(memory_format=LAST), (99, 6, 9, 9), "small images"),
    "small call": (nacre.Conv2d(6, 6, 3, groups=6), (2, 6, 9, 9), "under 1,024 values"),
    "small call of several channels": (nacre.Conv2d(6, 6, 3), (1, 6, 36, 37), "under 8,192 values"),
    "small product": (nacre.Conv2d(64, 6, 1), (1, 64, 14, 14), "under 16,384 values"),
    "half precision": (nacre.Conv2d(6, 6, 3, groups=6, dtype=torch.bfloat16), (99, 6, 9, 9), "half precision"),
    "few channels in short rows": (nacre.Conv2d(3, 6, 3), (99, 3, 9, 15), "several channels"),
    "three by three": (nacre.Conv2d(9, 6, 3), (99, 9, 9, 9), "several channels"),
    "few tiles": (nacre.Conv2d(32, 32, 3), (2, 32, 31, 31), "several channels"),
    "channels last, wide": (nacre.Conv2d(32, 32, 3).to(memory_format=LAST), (3, 32, 32, 34), "several channels"),
    "strided depthwise": (nacre.Conv2d(6, 6, 3, stride=2, groups=6), (99, 6, 14, 14), "short rows"),
    "strided product": (nacre.Conv2d(32, 32, 1, stride=2), (9, 32, 16, 16), "several channels"),
    "product of small images": (nacre.Conv2d(32, 32, 1), (28, 32, 7, 7), "several channels"),
}


@pytest.mark.usual_sizes
@pytest.mark.parametrize("name", BY_TORCH)
def test_calls_which_are_torchs_as_a_whole(name):
    layer, shape, reason = BY_TORCH[name]
    input = torch.randn(shape, dtype=layer.weight.dtype, requires_grad=True)
    with record_choices() as choices:
        output = layer(input)
    assert [(choice.operator, choice.implementation) for choice in choices] == [("conv2d", "torch")]
    assert reason in choices[0].reason
    expected = torchs_conv2d(input, layer.weight, layer.bias, layer.stride, groups=layer.groups)
    assert torch.equal(output, expected)
    grad = torch.randn_like(output)
    found, wanted = (torch.autograd.grad(result, [input, layer.weight], grad) for result in (output, expected))
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.usual_sizes
@pytest.mark.parametrize(
    ("layer", "shape", "first", "later"),
    [
        (nacre.Conv2d(3, 9, 3), (19, 3, 31, 16), "C++ kernel", "C++ kernel"),
        (nacre.Conv2d(3, 9, 3, stride=2), (9, 3, 99, 31), "torch", "C++ kernel"),
        (nacre.Conv2d(3, 9, 3, stride=2), (9, 3, 32, 31), "C++ kernel", "C++ kernel"),
        (nacre.Conv2d(3, 9, 3), (2, 3, 32, 31), "C++ kernel", "C++ kernel"),
        (nacre.Conv2d(3, 9, 3), (1, 3, 32, 31), "torch", "torch"),
        (nacre.Conv2d(3, 9, 5), (1, 3, 32, 31), "C++ kernel", "C++ kernel"),
        (nacre.Conv2d(3, 9, 3, stride=2), (9, 3, 31, 32), "C++ kernel", "C++ kernel"),
        (nacre.Conv2d(8, 9, 3, stride=3), (9, 8, 32, 31), "torch", "torch kernel"),
        (nacre.Conv2d(8, 9, 3, stride=3), (9, 8, 27, 31), "torch", "torch"),
        (nacre.Conv2d(31, 99, 3), (9, 31, 32, 31), "C++ kernel", "C++ kernel"),
        (nacre.Conv2d(32, 24, 3), (9, 32, 32, 31), "C++ kernel", "C++ kernel"),
        (nacre.Conv2d(32, 25, 3), (9, 32, 32, 31), "torch", "torch"),
        (nacre.Conv2d(9, 9, 3).to(memory_format=LAST), (9, 9, 32, 31), "torch", "torch"),
        (nacre.Conv2d(8, 9, 3).to(memory_format=LAST), (9, 8, 32, 31), "torch", "torch kernel"),
        (nacre.Conv2d(3, 9, 3), (99, 3, 15, 15), "torch", "torch kernel"),
        (nacre.Conv2d(4, 9, 3), (99, 4, 15, 15), "torch", "torch"),
        (nacre.Conv2d(1, 99, 3), (9, 1, 31, 34), "C++ kernel", "C++ kernel"),
        (nacre.Conv2d(1, 9, 4, stride=4), (9, 1, 32, 32), "torch", "C++ kernel"),
    ],
)
def test_a_first_layer_gains_less(layer, shape, first, later):
    """Where nobody asks for the gradient of the images, torch's are the fastest of wide strides and short rows."""
    for of_input, expected in ((False, first), (True, later)):
        with record_choices() as choices:
            layer(torch.randn(shape, requires_grad=of_input))
        assert [choice.implementation for choice in choices] == [expected]


@pytest.mark.usual_sizes
@pytest.mark.parametrize("channels", [1, 3])
def test_one_image_without_batch(channels):
    layer, image = nacre.Conv2d(channels, 6, 3), torch.randn(channels, 99, 99)
    # float32, sums of 27 products in another order
    torch.testing.assert_close(layer(image), layer(image[None])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.usual_sizes
def test_errors_of_calls_which_are_torchs_are_as_clear():
    with pytest.raises(RuntimeError, match=r"Conv2d\(9, 6, \(3, 3\), groups=1\) takes inputs of shape"):
        nacre.Conv2d(9, 6, 3)(torch.randn(1, 8, 9, 9))


@pytest.mark.usual_sizes
@pytest.mark.parametrize(
    ("layer", "shape", "forward", "backward"),
    [
        (nacre.Conv2d(6, 6, 3, groups=6), (99, 6, 9, 9), "C++ kernel", "C++ kernel"),
        (nacre.Conv2d(6, 9, 1), (19, 6, 14, 14), "C++ kernel", "C++ kernel"),
        (nacre.Conv2d(6, 6, 3, stride=2, groups=6), (99, 6, 20, 20), "torch kernel", "C++ kernel"),
        (nacre.Conv2d(3, 9, 3), (299, 3, 9, 9), "torch kernel", "C++ kernel"),
        (nacre.Conv2d(1, 16, 3), (29, 1, 9, 34), "C++ kernel", "C++ kernel"),
        (nacre.Conv2d(1, 17, 3), (29, 1, 9, 34), "C++ kernel", "C++ kernel"),
        (nacre.Conv2d(3, 9, 3), (9, 3, 9, 34), "C++ kernel", "C++ kernel"),
        (nacre.Conv2d(3, 9, 3), (3, 3, 9, 112), "C++ kernel", "C++ kernel"),
        (nacre.Conv2d(3, 9, 3, stride=2), (3, 3, 9, 223), "C++ kernel", "C++ kernel"),
        (nacre.Conv2d(4, 9, 3), (29, 4, 9, 17), "C++ kernel", "C++ kernel"),
        (nacre.Conv2d(4, 9, 5), (29, 4, 9, 31), "C++ kernel", "C++ kernel"),
        (nacre.Conv2d(4, 9, 5), (29, 4, 9, 33), "C++ kernel", "C++ kernel"),
        (nacre.Conv2d(3, 9, 5), (19, 3, 9, 34), "C++ kernel", "C++ kernel"),
        (nacre.Conv2d(3, 9, 3).to(memory_format=LAST), (99, 3, 9, 34), "torch kernel", "C++ kernel"),
        (nacre.Conv2d(32, 32, 3), (3, 32, 32, 34), "C++ kernel", "C++ kernel"),
        (nacre.Conv2d(6, 6, 5, groups=6), (99, 6, 8, 8), "torch kernel", "C++ kernel"),
        (nacre.Conv2d(6, 6, 5, groups=6).to(memory_format=LAST), (99, 6, 9, 9), "torch kernel", "C++ kernel"),
    ],
)
def test_which_kernel_runs(layer, shape, forward, backward):
    input = torch.randn(shape, requires_grad=True)
    with record_choices() as choices:
        output = layer(input)
        found = torch.autograd.grad(output, [input, *layer.parameters()], torch.ones_like(output))
    expected = torchs_conv2d(input, layer.weight, layer.bias, layer.stride, groups=layer.groups)
    wanted = torch.autograd.grad(expected, [input, *layer.parameters()], torch.ones_like(output))
    for one, other in zip((output, *found), (expected, *wanted), strict=True):
        # float32, sums of thousands of values in another order
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
        assert one.stride() == other.stride()
    assert [choice.implementation for choice in choices] == [forward, backward], choices
    assert forward == "C++ kernel" or "the C++ kernel asks for" in choices[0].reason
    assert str(nacre.explain(layer, torch.randn(shape, requires_grad=True))).startswith(f"conv2d: {forward} (")
    again = torch.autograd.grad(layer(input), [input, *layer.parameters()], torch.ones_like(output))
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))  # where nobody looks on


def test_torchs_kernel_is_torchs_to_the_bit():
    layer, input = nacre.Conv2d(33, 25, 5, padding=1), torch.randn(2, 33, 9, 9, requires_grad=True)
    reference = nacre.convert(nacre.Conv2d(33, 25, 5, padding=1), to="torch")
    reference.load_state_dict(layer.state_dict())
    with record_choices() as choices:
        found = [output := layer(input), *torch.autograd.grad(output.square().sum(), [input, *layer.parameters()])]
    assert [choice.implementation for choice in choices] == ["torch kernel", "torch kernel"]
    expected = [output := reference(input)]
    expected += torch.autograd.grad(output.square().sum(), [input, *reference.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_unequal_padding_by_torchs_kernel():
    """torch.nn pads unequally only where 'same' asks for it."""
    tensors = [torch.randn(2, 4, 9, 7).double(), torch.randn(6, 2, 3, 4).double(), torch.randn(6).double()]
    for margins in ([0, 1, 2, 0], [3, 0, 0, 0], [1, 1, 0, 2]):
        numbers = ([2, 1], margins, [1, 2], 2)
        grad = torch.randn_like(torch.ops.nacre.conv2d(*tensors, *numbers))
        for format in (torch.contiguous_format, torch.channels_last):
            given = [tensors[0].contiguous(memory_format=format), *tensors[1:]]
            found = results(lambda *leaves: torch.ops.nacre.conv2d(*leaves, *numbers), given, grad)  # noqa: B023
            for one, other in zip(found, torchs_results(given, numbers, grad), strict=True):
                # float64, sums of a few dozen products in another order
                torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
                assert one.stride() == other.stride()
