"""Calls too small for Python's part in them go to torch's own operators, as users meet them."""

import pytest
import torch

import nacre
from nacre.core import choice
from nacre.core.choice import kernels_at_any_size, record_choices

pytestmark = pytest.mark.usual_sizes

LAYERS = {
    "layer_norm": (nacre.LayerNorm(64), torch.nn.LayerNorm(64)),
    "softmax": (nacre.Softmax(dim=-1), torch.nn.Softmax(dim=-1)),
    "log_softmax": (nacre.LogSoftmax(dim=0), torch.nn.LogSoftmax(dim=0)),
    "gelu": (nacre.GELU("tanh"), torch.nn.GELU("tanh")),
    "relu": (nacre.ReLU(), torch.nn.ReLU()),
    "silu": (nacre.SiLU(), torch.nn.SiLU()),
    "tanh": (nacre.Tanh(), torch.nn.Tanh()),
    "sigmoid": (nacre.Sigmoid(), torch.nn.Sigmoid()),
}


def results(layer, input):
    input = input.detach().requires_grad_()
    output = layer(input)
    (gradient,) = torch.autograd.grad(output.square().sum(), input)
    return output, gradient


@pytest.mark.parametrize("name", LAYERS)
def test_small_calls_are_torchs_to_the_bit(name):
    layer, reference = LAYERS[name]
    input = torch.randn(32, 64)
    with record_choices() as choices:
        found = results(layer, input)
    assert [(choice.operator, choice.implementation) for choice in choices] == [(name, "torch")]
    assert all(torch.equal(one, other) for one, other in zip(found, results(reference, input), strict=True))


@pytest.mark.parametrize("name", LAYERS)
def test_large_calls_and_tests_run_the_kernel(name):
    layer, _ = LAYERS[name]
    with record_choices() as choices:
        layer(torch.randn(8192, 64))
    assert [choice.implementation for choice in choices] != ["torch"]
    with kernels_at_any_size(), record_choices() as choices:
        layer(torch.randn(64, 64))
    assert [choice.implementation for choice in choices] != ["torch"]


@pytest.mark.parametrize("function", [nacre.CrossEntropyLoss(label_smoothing=0.1), nacre.functional.cross_entropy])
def test_small_losses_are_torchs_to_the_bit(function):
    settings = {"label_smoothing": 0.1} if isinstance(function, torch.nn.Module) else {}
    target = torch.randint(64, (32,))
    input = torch.randn(32, 64)
    with record_choices() as choices:
        found = results(lambda logits: function(logits, target), input)
    assert [(choice.operator, choice.implementation) for choice in choices] == [("cross_entropy", "torch")]
    expected = results(lambda logits: torch.nn.functional.cross_entropy(logits, target, **settings), input)
    unrecorded = results(lambda logits: function(logits, target), input)
    for one, two, three in zip(found, unrecorded, expected, strict=True):
        assert torch.equal(one, three)
        assert torch.equal(two, three)


def test_small_losses_of_half_precision_and_of_short_rows_are_nacres():
    with record_choices() as choices:
        nacre.functional.cross_entropy(torch.randn(8, 8, dtype=torch.bfloat16), torch.arange(8))
        nacre.functional.cross_entropy(torch.randn(600, 8), torch.arange(600) % 8)
    assert [choice.implementation for choice in choices if choice.implementation == "torch"] == []
    assert len(choices) == 2


@pytest.mark.parametrize("name", LAYERS)
def test_unrecorded_small_calls_are_torchs_to_the_bit(name):
    layer, reference = LAYERS[name]
    input = torch.randn(32, 64)
    assert all(
        torch.equal(one, other) for one, other in zip(results(layer, input), results(reference, input), strict=True)
    )


def test_who_watches_is_told():
    assert choice.unwatched
    with record_choices(), kernels_at_any_size():
        assert not choice.unwatched
    with kernels_at_any_size():
        assert not choice.unwatched
    assert choice.unwatched


@pytest.mark.parametrize("layer", [nacre.ReLU(inplace=True), nacre.SiLU(inplace=True)], ids=repr)
def test_small_calls_in_place(layer):
    input = torch.randn(8, 8)
    expected = type(layer)()(input)
    assert layer(input) is input
    assert torch.equal(input, expected)


def test_errors_of_small_calls_are_as_clear():
    with pytest.raises(RuntimeError, match=r"Did you mean LayerNorm\(256\)\?"):
        nacre.LayerNorm(512)(torch.randn(4, 256))
    with pytest.raises(IndexError):
        nacre.Softmax(dim=5)(torch.randn(4, 4))
    with pytest.raises(IndexError, match="the classes are 0 to 3"):
        nacre.CrossEntropyLoss()(torch.randn(2, 4), torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"batch_size \(2\) to match target batch_size \(3\); got"):
        nacre.CrossEntropyLoss()(torch.randn(2, 4), torch.tensor([0, 1, 2]))


def test_explain_says_why():
    explanation = str(nacre.explain(nacre.GELU("tanh"), torch.randn(8, 8)))
    assert explanation.startswith("gelu: torch (under ")


def test_compiled_small_calls_stay_nacres():
    layer = torch.compile(nacre.GELU(), backend="eager", fullgraph=True)
    input = torch.randn(8, 8)
    with record_choices() as choices:
        found = layer(input)
    assert [choice.implementation for choice in choices] != ["torch"]
    torch.testing.assert_close(found, torch.nn.functional.gelu(input))


def few_queries(queries, keys=64, **keywords):
    """Which implementation attention chooses, and whether the result is torch's to the bit."""
    query, *others = (torch.randn(1, 4, length, 16, **keywords) for length in (queries, keys, keys))
    with record_choices() as choices:
        found = nacre.functional.scaled_dot_product_attention(query, *others)
    expected = torch.nn.functional.scaled_dot_product_attention(query, *others)
    torch.testing.assert_close(found, expected)
    return [choice.implementation for choice in choices][-1], torch.equal(found, expected)


def test_attention_of_few_queries_without_a_backward_is_torchs():
    assert few_queries(1) == few_queries(20) == few_queries(20, 9000) == ("torch", True)
    assert few_queries(33)[0] != "torch"
    assert few_queries(2, 9000)[0] != "torch"  # so many keys that nacre's kernel is ahead
    assert few_queries(1, requires_grad=True)[0] != "torch"
    with torch.no_grad():
        assert few_queries(1, requires_grad=True)[0] == "torch"


def test_errors_of_few_queries_are_as_clear():
    query = torch.randn(1, 2, 3, 8)
    with pytest.raises(RuntimeError, match="a value for each key"):
        nacre.functional.scaled_dot_product_attention(query, query, query[:, :, :2])
    with pytest.raises(RuntimeError, match="one dtype"):
        nacre.functional.scaled_dot_product_attention(query, query.double(), query)
