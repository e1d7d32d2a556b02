"""Linear: what is special to it beyond the contract."""

import pytest
import torch
import torch.nn.functional as F

import nacre
from nacre.core.choice import record_choices
from nacre.layers import LAYERS


def test_parameters():
    assert sum(p.numel() for p in nacre.Linear(512, 256).parameters()) == 131_328


def test_gradients_are_the_products_of_the_formula():
    """On small integers, where float32 is exact: dx = g W, dW = g' x, db = sum g."""
    input = torch.randint(-4, 5, (3, 2, 5)).float().requires_grad_()
    weight = torch.randint(-4, 5, (7, 5)).float().requires_grad_()
    bias = torch.randint(-4, 5, (7,)).float().requires_grad_()
    grad = torch.randint(-4, 5, (3, 2, 7)).float()
    output = nacre.functional.linear(input, weight, bias)
    assert torch.equal(output, torch.einsum("abd,ed->abe", input, weight) + bias)
    grad_input, grad_weight, grad_bias = torch.autograd.grad(output, (input, weight, bias), grad)
    assert torch.equal(grad_input, torch.einsum("abe,ed->abd", grad, weight))
    assert torch.equal(grad_weight, torch.einsum("abe,abd->ed", grad, input))
    assert torch.equal(grad_bias, grad.sum((0, 1)))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5)])
def test_no_rows_give_gradients_of_zero(shape):
    layer = nacre.Linear(5, 3)
    layer(torch.empty(shape)).sum().backward()
    assert torch.equal(layer.weight.grad, torch.zeros(3, 5))
    assert torch.equal(layer.bias.grad, torch.zeros(3))


@pytest.mark.parametrize("bias", [True, False])
def test_same_bits_as_torch_in_bfloat16(bias):
    layer = nacre.Linear(33, 17, bias=bias, dtype=torch.bfloat16)
    input = torch.randn(19, 33, dtype=torch.bfloat16)
    assert torch.equal(layer(input), F.linear(input, layer.weight, layer.bias))


def test_keeps_the_input_itself():
    kept = []
    layer = nacre.Linear(4, 3)
    input = torch.randn(2, 5, 4)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(input)
    assert {tensor.data_ptr() for tensor in kept} == {input.data_ptr(), layer.weight.data_ptr()}


@pytest.mark.parametrize(
    ("weight", "bias"),
    [((5,), None), ((3, 5), ()), ((3, 5), (1,)), ((3, 5), (1, 3)), ((3, 5), (2, 3))],
    ids=["1-d weight", "0-d bias", "bias of one value", "bias of one row", "bias of all rows"],
)
def test_parameters_of_unusual_shape_are_left_to_torch(weight, bias):
    tensors = [torch.randn(shape, requires_grad=True) for shape in ((2, 5), weight, bias) if shape is not None]
    with record_choices() as choices:
        output = nacre.functional.linear(*tensors)
    assert [choice.implementation for choice in choices] == ["torch"]
    expected = F.linear(*tensors)
    assert torch.equal(output, expected)
    for ours, torchs in zip(
        torch.autograd.grad(output.sum(), tensors), torch.autograd.grad(expected.sum(), tensors), strict=True
    ):
        assert torch.equal(ours, torchs)


BAD = {
    "last dimension": ((2, 5), (4, 8), (4,)),
    "transposed": ((8, 5), (4, 8), (4,)),
    "unflattened": ((3, 2, 4), (4, 8), (4,)),
    "no dimensions": ((), (4, 8), (4,)),
    "no bias": ((2, 5), (4, 8), None),
    "bias": ((2, 8), (4, 8), (5,)),
    "empty bias": ((2, 8), (4, 8), (0,)),
    "empty input": ((0,), (4, 8), (4,)),
    "3-d weight": ((2, 8), (1, 4, 8), (4,)),
    "0-d weight": ((2, 8), (), None),
    "bias of more rows": ((2, 8), (4, 8), (3, 4)),
}


@pytest.mark.parametrize("shapes", BAD.values(), ids=BAD)
def test_bad_shapes(shapes):
    tensors = [None if shape is None else torch.ones(shape) for shape in shapes]
    for function in (F.linear, nacre.functional.linear):
        with pytest.raises(RuntimeError):
            function(*tensors)


@pytest.mark.parametrize(
    ("shape", "fix"),
    [
        ((2, 5), "Did you mean Linear(5, 4)?"),
        ((5,), "Did you mean Linear(5, 4)?"),
        ((8, 5), "Did you mean input.transpose(-1, -2)?"),
        ((3, 2, 4), "Did you mean input.flatten(1)?"),
        ((0, 2, 4), "Did you mean input.flatten(1)?"),
        ((), "Give the input at least one dimension, as input.reshape(1) does."),
    ],
)
def test_message(shape, fix):
    with pytest.raises(RuntimeError) as raised:
        nacre.Linear(8, 4)(torch.ones(shape))
    rule = "Linear(8, 4) takes inputs whose last dimension is 8" if shape else "Linear(8, 4) takes 8 features"
    assert str(raised.value).endswith(f"{rule}; got an input of shape {shape}. {fix}")
    with pytest.raises(RuntimeError) as raised_by_torch:
        torch.nn.Linear(8, 4)(torch.ones(shape))
    torchs = str(raised_by_torch.value).split(", but they are")[0]  # what follows differs: of which argument it is told
    if len(shape) < 3:  # torch counts the rows of more dimensions in one of two ways
        assert str(raised.value).startswith(torchs)


@pytest.mark.parametrize(
    "convert",
    [
        lambda tensor: tensor.double(),
        lambda tensor: tensor.bfloat16(),
        lambda tensor: tensor.long(),
        lambda tensor: tensor.to(torch.complex64),
        lambda tensor: tensor.to("meta"),
    ],
    ids=["float64", "bfloat16", "int64", "complex64", "meta"],
)
def test_mixed_tensors(convert):
    input, weight, bias = torch.ones(2, 8), torch.ones(4, 8), torch.ones(4)
    for arguments in ((convert(input), weight, bias), (input, weight, convert(bias))):
        try:
            expected = F.linear(*arguments)
        except RuntimeError:
            with pytest.raises(RuntimeError):
                nacre.functional.linear(*arguments)
        else:  # torch takes an input on meta, and computes on meta
            assert nacre.functional.linear(*arguments).device == expected.device


def test_float64_under_autocast_raises_as_in_torch():
    input, weight = torch.ones(2, 8, dtype=torch.float64), torch.ones(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        for function in (F.linear, nacre.functional.linear):
            with pytest.raises(RuntimeError):
                function(input, weight)


def test_bill():
    spec = LAYERS["linear"]
    layer = spec.layer(768, 3072)
    bill = spec.cost(**spec.sizes(layer, torch.empty(8, 197, 768, requires_grad=True)))
    assert bill.flops == 2 * 8 * 197 * 768 * 3072
    assert bill.backward_flops == 2 * bill.flops
    assert bill.saved_bytes == 4 * 8 * 197 * 768
    assert bill.bytes == 4 * (8 * 197 * (768 + 3072) + 768 * 3072 + 3072)
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    frozen = spec.cost(**spec.sizes(layer, torch.empty(8, 197, 768)))
    assert frozen.backward_flops == frozen.backward_bytes == frozen.saved_bytes == 0
