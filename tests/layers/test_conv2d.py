"""What is special to Conv2d: the correlation, strides and rows left over, memory formats, counts, bad input."""

import random
from itertools import product

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import conv2d as torchs_conv2d
from torch.nn.functional import pad
from torch.utils.flop_counter import FlopCounterMode

import nacre
from nacre.core.choice import record_choices
from nacre.functional import conv2d
from nacre.layers.conv2d import formula
from nacre.layers.conv2d.cases import CASES
from nacre.layers.conv2d.cost import cost, sizes
from tests.support import CountProducts

SMALL = [pytest.param(case, id=case.name) for case in CASES if not case.bench]
FORMATS = (torch.contiguous_format, torch.channels_last)


def test_correlate_is_the_sum_it_is_said_to_be():
    x, w = torch.randn(2, 2, 3, 6, 7, dtype=torch.float64), torch.randn(2, 2, 3, 2, 3, dtype=torch.float64)
    (down, across), (tap_down, tap_across) = stride, dilation = [2, 1], [3, 2]
    found = formula.correlate(x, w, stride, dilation)
    assert found.shape == (2, 2, 2, 2, 3)
    expected = torch.zeros_like(found)
    for n, g, o, p, q in product(*(range(size) for size in found.shape)):
        window = x[n, g, :, p * down :: tap_down, q * across :: tap_across][:, :2, :3]
        expected[n, g, o, p, q] = (window * w[g, o]).sum()
    # float64, sums of 18 products in another order
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def random_call(draw):
    """Numbers of one convolution, drawn freely but for a kernel that fits."""
    while True:
        groups, taps = draw.choice((1, 1, 2, 3)), (draw.randint(1, 4), draw.randint(1, 4))
        stride, dilation = ((draw.choice((1, 1, 2, 3, 4)), draw.choice((1, 2, 5))) for _ in "sd")
        margins = [draw.choice((0, 0, 1, 2, 5)) for _ in range(4)]
        height, width = draw.randint(1, 9), draw.randint(1, 9)
        fits = (
            height + margins[2] + margins[3] > (taps[0] - 1) * dilation[0]
            and width + margins[0] + margins[1] > (taps[1] - 1) * dilation[1]
        )
        if fits:
            shape = (draw.choice((0, 1, 3)), groups * draw.randint(1, 3), height, width)
            weight = (groups * draw.randint(1, 3), shape[1] // groups, *taps)
            return shape, weight, list(stride), margins, list(dilation), groups


@pytest.mark.parametrize("seed", range(4))
def test_random_numbers(seed):
    """The formula takes another padding on each side, as 'same' may need."""
    draw = random.Random(seed)
    for _ in range(50):
        shape, weight_shape, stride, margins, dilation, groups = random_call(draw)
        input, weight, bias = (
            torch.randn(size, dtype=torch.float64, requires_grad=True)
            for size in (shape, weight_shape, weight_shape[:1])
        )
        expected = torchs_conv2d(pad(input, margins), weight, bias, stride, 0, dilation, groups)
        grad = torch.randn_like(expected)
        output, saved = formula.forward(input, weight, bias, stride, margins, dilation, groups)
        found = [output, *formula.backward(grad, saved, [True] * 3)]
        wanted = [expected, *torch.autograd.grad(expected, (input, weight, bias), grad)]
        for one, other in zip(found, wanted, strict=True):
            # float64, sums of a few hundred products in another order
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_rows_that_no_window_reaches_have_no_gradient():
    input = torch.randn(1, 1, 6, 7, requires_grad=True)
    conv2d(input, torch.ones(1, 1, 2, 2), stride=3).sum().backward()
    # windows begin at 0 and 3 and are two long: index 2 lies between them, column 6 behind them
    reached = torch.ones(6, 7)
    reached[2] = reached[:, 2] = reached[5:] = reached[:, 5:] = 0
    assert torch.equal(input.grad[0, 0], reached)


@pytest.mark.parametrize("case", SMALL)
def test_output_size_is_the_size_of_the_output(case):
    layer = nacre.Conv2d(**case.arguments)
    (input,), _ = case.make()
    assert layer.output_size(*input.shape[-2:]) == tuple(layer(input).shape[-2:])


def test_output_size_of_an_input_that_is_too_small():
    with pytest.raises(RuntimeError, match=r"input size per channel: \(4 x 9\)\. Kernel size: \(5 x 5\)"):
        nacre.Conv2d(1, 1, 3, dilation=2, padding=1).output_size(2, 7)


@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("formats", list(product(FORMATS, FORMATS)), ids=str)
def test_memory_format_is_torchs(formats, images):
    shapes = [(4, 8, 3, 1), (4, 8, 1, 1), (1, 4, 3, 1), (4, 1, 3, 1), (4, 4, 3, 4), (4, 8, 5, 1)]
    for in_channels, out_channels, taps, groups in shapes:
        input = torch.randn(images, in_channels, 5, 5).contiguous(memory_format=formats[0])
        weight = torch.randn(out_channels, in_channels // groups, taps, taps).contiguous(memory_format=formats[1])
        for given in (input, input[..., :1, :1] if taps == 1 else input[..., 0:5, :], input.transpose(2, 3)):
            ours, torchs = (f(given, weight, groups=groups) for f in (conv2d, torchs_conv2d))
            assert ours.shape == torchs.shape
            assert ours.stride() == torchs.stride() or not images
            if images == 1:  # one image without a batch
                assert conv2d(given[0], weight, groups=groups).shape == torchs.shape[1:]


def test_fake_tensors_have_the_memory_formats_of_real_ones():
    numbers = ([2, 1], [1, 2, 0, 1], [1, 2], 2)
    for formats in product(FORMATS, FORMATS):
        input, weight = (
            torch.randn(shape).contiguous(memory_format=format)
            for shape, format in zip([(2, 4, 6, 7), (6, 2, 3, 2)], formats, strict=True)
        )
        grad = torch.randn_like(torch.ops.nacre.conv2d(input, weight, None, *numbers))
        for operator, arguments in (
            (torch.ops.nacre.conv2d.default, (input, weight, torch.randn(6), *numbers)),
            (torch.ops.nacre.conv2d_backward.default, (grad, input, weight, *numbers, [True, True, True])),
        ):
            torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_once(dtype):
    input, weight, bias = (torch.randn(shape).to(dtype) for shape in [(2, 32, 6, 6), (4, 32, 3, 3), (4,)])
    output = conv2d(input, weight, bias)
    exact = torchs_conv2d(input.double(), weight.double(), bias.double())
    # the float32 sum of 289 terms adds less than a 64th of the half unit of the rounding
    assert ((output.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps / 2 * (1 + 1 / 64) + 1e-5).all()


def test_one_graph_serves_every_size():
    layer = nacre.Conv2d(2, 3, 3, stride=2, padding=1)
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=graphs)
    for size in ((3, 2, 8, 9), (4, 2, 12, 20), (5, 2, 11, 6)):
        input = torch.randn(size, requires_grad=True)
        (found,), (expected,) = (
            torch.autograd.grad(module(input).square().sum(), input) for module in (compiled, layer)
        )
        assert torch.equal(found, expected)
    assert graphs.frame_count == 1


# ---- counts


def test_published_numbers():
    assert sum(p.numel() for p in nacre.Conv2d(3, 64, 3, padding=1).parameters()) == 1792
    stem = nacre.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
    # multiply-adds of the first layer of the ResNets, He et al. 2016, table 1: 64 x 112 x 112 outputs, 147 taps each
    assert cost(**sizes(stem, torch.empty(1, 3, 224, 224))).flops == 2 * 118_013_952


def test_flops_of_resnet_18():
    """1,814,073,344 multiply-adds, 1.814 G in torchvision's table of models, and 11,689,512 parameters."""
    shapes = [(3, 64, 7, 2, 224), *[(64, 64, 3, 1, 56)] * 4]
    for channels, size in ((128, 28), (256, 14), (512, 7)):
        before = channels // 2
        shapes += [(before, channels, 3, 2, 2 * size), *[(channels, channels, 3, 1, size)] * 3]
        shapes += [(before, channels, 1, 2, 2 * size)]
    bills = []
    for in_channels, out_channels, taps, stride, size in shapes:
        with torch.device("meta"):
            layer = nacre.Conv2d(in_channels, out_channels, taps, stride, taps // 2, bias=False)
            bills.append(cost(**sizes(layer, torch.empty(1, in_channels, size, size))))
    classifier, normalisation = 512 * 1000, 9600
    assert sum(b.flops for b in bills) // 2 + classifier == 1_814_073_344
    assert sum(b.parameters for b in bills) + classifier + 1000 + normalisation == 11_689_512


# of one product alone, einsum makes no matrix product that could be counted
@pytest.mark.parametrize("case", [param for param in SMALL if param.id != "one of everything"])
def test_the_formula_multiplies_what_is_counted(case):
    """Forward and the weight's gradient form exactly the counted products. The input's gradient also multiplies zeros:
    those around the gradient, and taps which are set between others where stride does not divide their number."""
    layer = nacre.Conv2d(**case.arguments).requires_grad_(False)
    (input,), _ = case.make()
    input = input.detach()
    expected = cost(**sizes(layer, input))
    with CountProducts() as forward:
        layer(input)
    assert forward.flops == expected.flops
    layer.weight.requires_grad_()
    output = layer(input)
    with CountProducts() as backward:
        torch.autograd.grad(output, layer.weight, torch.ones_like(output))
    assert backward.flops == cost(**sizes(layer, input)).backward_flops == expected.flops


# of torch's reference, for an odd number of rows to pad
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("case", [param for param in SMALL if param.values[0].arguments.get("groups", 1) == 1])
def test_flops_are_those_which_torch_counts_over_its_own_convolution(case):
    """Without groups, which torch's counter leaves out of the weight's gradient."""
    layer = nacre.Conv2d(**case.arguments)
    (input,), _ = case.make()
    reference = nacre.convert(nacre.Conv2d(**case.arguments), to="torch")
    input.requires_grad_()
    expected = cost(**sizes(layer, input))
    with FlopCounterMode(display=False) as counter:
        output = reference(input)
    assert counter.get_total_flops() == expected.flops
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    assert counter.get_total_flops() == expected.backward_flops


def test_a_stride_as_long_as_the_kernel_multiplies_no_zeros():
    layer = nacre.Conv2d(3, 5, 4, stride=4)
    input = torch.randn(2, 3, 12, 8, requires_grad=True)
    output = layer(input)
    with CountProducts() as backward:
        torch.autograd.grad(output, [input, layer.weight], torch.ones_like(output))
    assert backward.flops == cost(**sizes(layer, input)).backward_flops


def test_cost_takes_symbols():
    sympy = pytest.importorskip("sympy")  # comes with torch
    images, channels, height = sympy.symbols("N C H", integer=True, positive=True)
    result = cost(images, channels, 64, height, height, 3, 3, padding=(2, 2), bias=1, bias_gradient=1)
    assert sympy.expand(result.flops - 2 * images * 64 * height**2 * channels * 9) == 0


# ---- what the op does not serve, and bad input


def test_calls_left_to_torch():
    real = torch.randn(1, 2, 3, 3)
    kernel = torch.randn(2, 2, 2, 2)
    for arguments, reason in (
        ((real.long(), kernel.long()), "dtype torch.int64"),
        ((real.cfloat(), kernel.cfloat()), "dtype torch.complex64"),
        ((real[:, :0], kernel[:, :0]), "without channels"),
        ((real, kernel, None, torch.tensor(1)), "a number of type Tensor"),
    ):
        with record_choices() as choices:
            output = conv2d(*arguments)
        assert [choice.implementation for choice in choices] == ["torch"] and reason in choices[0].reason
        assert torch.equal(output, torchs_conv2d(*arguments))


IMAGE, KERNEL = torch.ones(2, 6, 5, 5), torch.ones(4, 6, 3, 3)
BAD = {
    "no channels": ((IMAGE[0, 0], KERNEL), "takes inputs of shape"),
    "five dimensions": ((IMAGE[None], KERNEL), "takes inputs of shape"),
    "channels": ((IMAGE[:, :5], KERNEL), r"Conv2d\(6, 4, \(3, 3\), groups=1\).*got an input of shape \(2, 5, 5, 5\)"),
    "channels at the end": ((torch.ones(2, 5, 5, 6), KERNEL), r"Did you mean input\.movedim\(-1, -3\)"),
    "one channel left out": ((torch.ones(2, 5, 5), KERNEL[:, :1]), r"Did you mean input\.unsqueeze\(1\)"),
    "an image alone": ((torch.ones(5, 5), KERNEL[:, :1]), r"Did you mean input\.unsqueeze\(0\)"),
    "no rows": ((IMAGE[:, :, :0], KERNEL, None, 1, 2), "at least one row"),
    "flat weight": ((IMAGE, KERNEL[0]), "the weight of conv2d has the shape"),
    "weight without taps": ((IMAGE, KERNEL[..., :0]), "the weight of conv2d has the shape"),
    "weight without outputs": ((IMAGE, KERNEL[:0]), "the weight of conv2d has the shape"),
    "bias": ((IMAGE, KERNEL, torch.ones(3)), "one for each output channel"),
    "no groups": ((IMAGE, KERNEL, None, 1, 0, 1, 0), "groups is a positive number"),
    "uneven groups": ((IMAGE, KERNEL[:, :2], None, 1, 0, 1, 3), "groups = 3 for 4 output channels"),
    "stride": ((IMAGE, KERNEL, None, 0), "the stride of conv2d is at least 1"),
    "three strides": ((IMAGE, KERNEL, None, (1, 1, 1)), "one number or a pair"),
    "negative padding": ((IMAGE, KERNEL, None, 1, -1), "the padding of conv2d is at least 0"),
    "name of padding": ((IMAGE, KERNEL, None, 1, "full"), "'same', 'valid' or numbers; got 'full'"),
    "same with stride": ((IMAGE, KERNEL, None, 2, "same"), "keeps the size of the input"),
    "dilation": ((IMAGE, KERNEL, None, 1, 0, 0), "the dilation of conv2d is at least 1"),
    "large kernel": ((IMAGE, torch.ones(4, 6, 6, 3)), "reaches over 6 x 3 values"),
    "dtype": ((IMAGE.double(), KERNEL), "one dtype"),
    "dtype of bias": ((IMAGE, KERNEL, torch.ones(4).double()), "one dtype"),
    "dtype of stride": ((IMAGE, KERNEL, None, 1.5), "stride"),
    "truth as stride": ((IMAGE, KERNEL, None, True), "stride"),
    "no input": ((None, KERNEL), "input"),
    "list": (([1.0], KERNEL), "input"),
    "float8": ((IMAGE.to(torch.float8_e4m3fn), KERNEL.to(torch.float8_e4m3fn)), "not implemented"),
}


IN_TORCHS_WORDS = {"no channels", "five dimensions", "channels", "channels at the end", "stride", "negative padding"}
IN_TORCHS_WORDS |= {"name of padding", "same with stride", "dilation", "large kernel"}


@pytest.mark.parametrize("name", BAD)
def test_errors_are_of_torchs_type(name):
    arguments, message = BAD[name]
    with pytest.raises(Exception) as torchs:
        torchs_conv2d(*arguments)
    with pytest.raises(torchs.type, match=message) as ours:
        conv2d(*arguments)
    if name in IN_TORCHS_WORDS:  # batches of one are added by torch before it speaks of the input
        said = str(torchs.value).split(", but got input of size")[0].split("input[")[0]
        assert str(ours.value).startswith(said)


def test_errors_of_the_class():
    for arguments, kind in (
        ({"stride": 2, "padding": "same"}, ValueError),
        ({"groups": 2}, ValueError),
        ({"padding_mode": "mirror"}, ValueError),
    ):
        for layer in (torch.nn.Conv2d, nacre.Conv2d):
            with pytest.raises(kind):
                layer(3, 4, 3, **arguments)
    for mode in ("reflect", "circular"):
        with pytest.raises(RuntimeError):
            nacre.Conv2d(3, 4, 3, padding=7, padding_mode=mode)(torch.ones(2, 3, 5, 5))
