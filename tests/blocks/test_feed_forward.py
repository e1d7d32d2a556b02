"""Two linear maps with what stands between them as one: the same values, and only the hidden features kept."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import nacre
from nacre.blocks import BLOCKS
from nacre.core import native
from nacre.core.choice import record_choices
from nacre.layers.linear import feed_forward
from tests.support import SavedBytes, assert_as_good_as_torch

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda hidden: F.gelu(hidden, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}
# rows, features in, hidden, out: around a vector, a tile of a product and four vectors
SHAPES = [(1, 1, 1, 1), (7, 5, 13, 3), (17, 63, 65, 127), (65, 64, 300, 17), (0, 4, 5, 4)]


def leaves(rows, features, hidden, outputs, dtype=torch.float32, bias=True):
    shapes = (2, rows, features), (hidden, features), (hidden,), (outputs, hidden), (outputs,)
    made = [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
    return made if bias else [made[0], made[1], None, made[3], None]


def apart(x, weight1, bias1, weight2, bias2, activation, p, training=True):
    hidden = ACTIVATIONS[activation](F.linear(x, weight1, bias1))
    return F.linear(nacre.functional.dropout(hidden, p, training), weight2, bias2)


def results(function, given, *options):
    torch.manual_seed(3)
    output = function(*given, *options)
    state = torch.get_rng_state()
    grad = torch.randn(output.shape, dtype=torch.float64).to(output.dtype)
    asked = [tensor for tensor in given if tensor is not None and tensor.requires_grad]
    return [output.detach(), *torch.autograd.grad(output, asked, grad)], state


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_at_most_twice_torchs_with_dropouts_own_mask(shape, dtype, activation, p, bias):
    given = leaves(*shape, dtype=dtype, bias=bias)
    with record_choices() as choices:
        ours, state = results(feed_forward, given, activation, p, True)
    if not native.unavailable():
        assert [choice.implementation for choice in choices] == ["C++ kernel"] * 2
    theirs, expected_state = results(apart, given, activation, p)
    wide = [tensor if tensor is None else tensor.detach().double().requires_grad_() for tensor in given]
    assert torch.equal(state, expected_state)
    for index, values in enumerate(zip(ours, theirs, results(apart, wide, activation, p)[0], strict=True)):
        assert_as_good_as_torch(*values, dtype, f"result {index}")
        assert values[0].stride() == values[1].stride()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_formula_and_its_derivatives(activation):
    given = leaves(3, 4, 5, 2, dtype=torch.float64)

    def function(*values):
        torch.manual_seed(1)
        return feed_forward(*values, activation, 0.4, True)

    if activation == "relu":  # its kink lies away from these values
        given = [tensor.detach().add(0.01).requires_grad_() for tensor in given]
    assert torch.autograd.gradcheck(function, given, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, given, fast_mode=True)
    # the formula, which torch differentiates, against the kernel
    kernel, _ = results(feed_forward, given, activation, 0.4, True)
    torch.manual_seed(3)
    output, pull_back = torch.func.vjp(lambda *values: feed_forward(*values, activation, 0.4, True), *given)
    grad = torch.randn(output.shape, dtype=torch.float64)
    for one, other in zip(kernel, (output, *pull_back(grad)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)  # float64 sums of five terms


@pytest.mark.usual_algorithms
def test_the_same_bits_for_any_number_of_threads():
    given, found = leaves(150, 65, 257, 33), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(results(feed_forward, given, "gelu", 0.3, True)[0])
    for one, two, three in zip(*found, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)


@pytest.mark.parametrize("index", range(5))
def test_only_the_gradients_asked_for(index):
    given = leaves(5, 6, 7, 4)
    every, _ = results(feed_forward, given, "silu", 0.3, True)
    for place, tensor in enumerate(given):
        tensor.requires_grad_(place == index)
    some, _ = results(feed_forward, given, "silu", 0.3, True)
    assert len(some) == 2 and torch.equal(some[1], every[1 + index])


def test_infinity_and_nan_show():
    given = [tensor.detach() for tensor in leaves(3, 4, 6, 2)]
    given[0][0, 0, 0], given[0][1, 1, 1] = torch.inf, torch.nan
    for activation in ACTIVATIONS:
        torch.manual_seed(0)
        found = feed_forward(*given, activation, 0.5, True)
        torch.manual_seed(0)
        assert torch.equal(found.isfinite(), apart(*given, activation, 0.5).isfinite())


def test_the_kernel_itself_refuses_what_does_not_fit():
    if reason := native.unavailable():
        pytest.skip(reason)
    forward, backward = torch.ops.nacre.feed_forward.kernel, torch.ops.nacre.feed_forward_backward.kernel
    x, w, b = torch.ones(2, 3), torch.ones(4, 3), torch.ones(4)
    for message, call in {
        "its activation": lambda: forward(x, w, b, w.T, None, "sine", None, 0.0),
        "last dimension": lambda: forward(x, w.T, None, w, None, "relu", None, 0.0),
        "one bias a hidden": lambda: forward(x, w, b[:3], w.T, None, "relu", None, 0.0),
        "one bias an output": lambda: forward(x, w, b, w.T, b, "relu", None, 0.0),
        "one dtype": lambda: forward(x, w, b, w.T.double(), None, "relu", None, 0.0),
        "float32 and float64": lambda: forward(x.half(), w.half(), None, w.T.half(), None, "relu", None, 0.0),
        "five gradients": lambda: backward(x, x, w, b, w.T, "relu", None, 0.0, torch.ones(2, 4), [True]),
        "of the output": lambda: backward(x[:1], x, w, b, w.T, "relu", None, 0.0, torch.ones(2, 4), [True] * 5),
        "as the forward": lambda: backward(x, x, w, b, w.T, "relu", None, 0.0, torch.ones(4, 2).T, [True] * 5),
        "shape and dtype": lambda: backward(x[:1], x, w, b, w.T, "relu", None, 0.0, torch.ones(1, 4), [True] * 5),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call()
    with pytest.raises(ValueError, match="probability"):
        feed_forward(x, w, b, w.T, None, "relu", 1.5, True)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_layer_keeps_the_hidden_features_once(activation):
    ours = nacre.TransformerEncoderLayer(16, 2, 64, 0.3, activation)
    theirs = nn.TransformerEncoderLayer(16, 2, 64, 0.3, activation)
    kept = []
    for layer in (ours, theirs):
        with SavedBytes(layer) as saved:
            layer(torch.randn(5, 3, 16, requires_grad=True))
        kept.append(saved.bytes)
    hidden = 5 * 3 * 64 * 4
    assert kept[0] + hidden <= kept[1]


@pytest.mark.parametrize("part", ["linear1", "dropout", "linear2"])
def test_a_hook_inside_fires_and_changes_nothing(part):
    layer = nacre.TransformerEncoderLayer(16, 2, 64, 0.3, "gelu").double()
    x, called = torch.randn(5, 3, 16, dtype=torch.float64), []
    torch.manual_seed(0)
    expected = layer(x)
    layer.get_submodule(part).register_forward_hook(lambda *_: called.append(part))
    torch.manual_seed(0)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-13)  # float64, by other products
    assert called == [part]


ENCODER_LAYER = {"d_model": 16, "nhead": 2, "dim_feedforward": 24, "dropout": 0.1, "batch_first": True}
FROZEN = [(), ("norm",), ("linear1",), ("linear2",), ("self_attn", "norm1"), ("self_attn", "norm", "linear1"), ("",)]


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("frozen", FROZEN, ids=lambda names: " ".join(names) or "none")
def test_the_bill_of_a_layer_that_is_partly_frozen(frozen, gradient):
    layer, spec = nacre.TransformerEncoderLayer(**ENCODER_LAYER), BLOCKS["transformer_encoder_layer"]
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    x = torch.randn(2, 5, 16, requires_grad=gradient)
    bill = spec.cost(**spec.sizes(layer, x))
    with SavedBytes(layer) as saved:
        output = layer(x)
    assert bill.saved_bytes == saved.bytes
    with FlopCounterMode(display=False) as counter:
        if output.requires_grad:
            output.sum().backward()
    assert bill.backward_flops == counter.get_total_flops()
