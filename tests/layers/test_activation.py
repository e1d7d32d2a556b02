"""GELU, ReLU, SiLU, Tanh and Sigmoid: what is special to them beyond the contract."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F

import nacre
from nacre.core.choice import record_choices

NACRE = {
    "gelu": nacre.functional.gelu,
    "gelu, tanh": functools.partial(nacre.functional.gelu, approximate="tanh"),
    "relu": nacre.functional.relu,
    "silu": nacre.functional.silu,
    "tanh": nacre.functional.tanh,
    "sigmoid": nacre.functional.sigmoid,
}
TORCH = {
    "gelu": F.gelu,
    "gelu, tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": F.tanh,
    "sigmoid": F.sigmoid,
}
every = pytest.mark.parametrize("name", NACRE)
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def value_and_gradient(function, input):
    input = input.detach().clone().requires_grad_()
    output = function(input)
    (gradient,) = torch.autograd.grad(output, input, torch.ones_like(output))
    return output.detach(), gradient


@every
def test_known_values(name):
    at_1 = {
        "gelu": 0.5 * math.erfc(-math.sqrt(0.5)),  # the normal distribution at 1
        "gelu, tanh": 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * 1.044715)),
        "relu": 1.0,
        "silu": 1 / (1 + math.exp(-1)),
        "tanh": math.tanh(1),
        "sigmoid": 1 / (1 + math.exp(-1)),
    }
    # two ways of computing one number in float64
    assert NACRE[name](torch.tensor(1.0, dtype=torch.float64)).item() == pytest.approx(at_1[name], rel=1e-15)


@every
@pytest.mark.parametrize("dtype", FLOATS)
def test_special_values(name, dtype):
    special = torch.tensor([-math.inf, math.nan, 0.0, -0.0, -100.0, 100.0, -1e4, 1e4, -1e-30, 1e-30]).to(dtype)
    for ours, torchs in zip(
        value_and_gradient(NACRE[name], special), value_and_gradient(TORCH[name], special), strict=True
    ):
        # where torch gives 1e-44 in one place and 0 in another, either is right
        torch.testing.assert_close(ours, torchs, rtol=1e-6, atol=1e-40, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOATS)
def test_at_infinity(dtype):
    """torch's gelu gives infinity or NaN there, by dtype and length of the tensor; ours the limit."""
    limits = {"gelu": math.inf, "gelu, tanh": math.inf, "relu": math.inf, "silu": math.inf, "tanh": 1.0, "sigmoid": 1.0}
    for name, limit in limits.items():
        assert (NACRE[name](torch.full((33,), math.inf, dtype=dtype)) == limit).all(), name


def test_relu_at_0_and_nan():
    output, gradient = value_and_gradient(nacre.functional.relu, torch.tensor([-1.0, -0.0, 0.0, 1.0, math.nan]))
    assert torch.equal(output[:4], torch.tensor([0.0, 0.0, 0.0, 1.0])) and output[4].isnan()
    assert gradient.tolist() == [0.0, 0.0, 0.0, 1.0, 1.0]


def test_relu_at_0_where_torch_differentiates_the_formula():
    values = torch.tensor([-1.0, -0.0, 0.0, 1.0])
    _, tangent = torch.func.jvp(nacre.functional.relu, (values,), (torch.ones(4),))
    gradient = torch.func.grad(lambda x: nacre.functional.relu(x).sum())(values)
    assert tangent.tolist() == gradient.tolist() == [0.0, 0.0, 0.0, 1.0]


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(name, dtype):
    values = torch.linspace(-6, 6, 1001).to(dtype)
    output, gradient = value_and_gradient(NACRE[name], values)
    wide_output, wide_gradient = value_and_gradient(NACRE[name], values.float())
    assert torch.equal(output, wide_output.to(dtype))
    if name not in ("tanh", "sigmoid"):  # whose gradient follows from the rounded output, as torch's does
        assert torch.equal(gradient, wide_gradient.to(dtype))


LAYOUTS = {
    "channels_last": lambda made: made(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "permuted": lambda made: made(2, 3, 4, 5).permute(3, 0, 2, 1),
    "sliced": lambda made: made(4, 6)[:, ::2],
    "sliced channels_last": lambda made: made(2, 6, 4, 5).contiguous(memory_format=torch.channels_last)[:, ::2],
    "expanded": lambda made: made(3, 1).expand(3, 4),
    "expanded in front": lambda made: made(3).expand(5, 3),
    "one column": lambda made: made(4, 6)[:, :1],
    "0-d": lambda made: made(()),
}


@every
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_are_those_of_torch(name, layout, dtype):
    input = LAYOUTS[layout](functools.partial(torch.randn, dtype=dtype))
    assert NACRE[name](input).stride() == TORCH[name](input).stride()


@pytest.mark.parametrize("name", ["relu", "silu"])
def test_inplace(name):
    leaf = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    expected, expected_gradient = value_and_gradient(NACRE[name], leaf)
    given = leaf * 1
    output = NACRE[name](given, inplace=True)
    assert output is given
    assert torch.equal(output, expected)
    (gradient,) = torch.autograd.grad(output, leaf, torch.ones_like(output))
    assert torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize("name", ["relu", "silu"])
def test_inplace_second_derivative(name):
    def function(value):
        return NACRE[name](value * 1, inplace=True)

    value = torch.tensor([-1.5, 0.5, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, value, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, value)


@pytest.mark.parametrize("name", ["relu", "silu"])
def test_inplace_errors(name):
    bad = {
        "a leaf": torch.ones(3, requires_grad=True),
        "a view of a leaf": torch.ones(3, requires_grad=True)[:2],
        "an expanded tensor": torch.ones(1).expand(3),
    }
    for what, input in bad.items():
        for function in (TORCH[name], NACRE[name]):
            with pytest.raises(RuntimeError):
                function(input, inplace=True)
            assert (input == 1).all(), f"{what} was overwritten"


@pytest.mark.parametrize("name", ["relu", "silu"])
def test_inplace_on_what_another_layer_kept(name):
    """The tape notices that a value it needs was overwritten, as with torch's own."""
    leaf = torch.randn(5, requires_grad=True)
    for function in (TORCH[name], NACRE[name]):
        given = leaf.exp()
        output = function(given, inplace=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


def test_inplace_classes():
    for layer in (nacre.ReLU(inplace=True), nacre.SiLU(inplace=True)):
        input = torch.randn(3)
        assert layer(input) is input


@every
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_other_dtypes_are_left_to_torch(name, dtype):
    input = torch.tensor([0, 1, 1], dtype=dtype)
    try:
        expected = TORCH[name](input)
    except Exception as error:
        with pytest.raises(type(error)):
            NACRE[name](input)
        return
    with record_choices() as choices:
        output = NACRE[name](input)
    assert [choice.implementation for choice in choices] == ["torch"]
    assert output.dtype == expected.dtype and torch.equal(output, expected)


@every
def test_keeps_one_tensor(name):
    kept = []
    input = torch.randn(3, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        output = NACRE[name](input)
    expected = output if name in ("relu", "tanh", "sigmoid") else input
    assert [tensor.data_ptr() for tensor in kept] == [expected.data_ptr()]


def test_approximate():
    for function in (F.gelu, nacre.functional.gelu):
        with pytest.raises(RuntimeError, match=r"none.*tanh"):
            function(torch.ones(2), approximate="erf")
        with pytest.raises(TypeError):
            function(torch.ones(2), "tanh")
    with pytest.raises(RuntimeError, match=r"got approximate = 'erf'\."):
        nacre.GELU(approximate="erf")(torch.ones(2))


def test_distance_of_the_two_gelus():
    x = torch.linspace(-8, 8, 20_001, dtype=torch.float64)
    distance = (nacre.functional.gelu(x) - nacre.functional.gelu(x, approximate="tanh")).abs().max()
    assert 0.0004 < distance < 0.0005
