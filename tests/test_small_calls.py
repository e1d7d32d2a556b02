"""Calls too small for Python's part in them go to torch's own operators, as users meet them."""

import pytest
import torch

import nacre
from nacre.core import choice, native
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
    assert few_queries(33) == ("torch", True)  # few multiply-adds
    assert few_queries(33, 9000)[0] != "torch"
    assert few_queries(200, 200)[0] != "torch"
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


def evaluated(layer, *inputs, **keywords):
    """Which implementations an evaluation chooses, and what it returns."""
    with torch.no_grad(), record_choices() as choices:
        found = layer.eval()(*inputs, **keywords)
    return [(choice.operator, choice.implementation) for choice in choices], found


def attention_pair(embed_dim=32, **arguments):
    layer, reference = (library.MultiheadAttention(embed_dim, 4, **arguments) for library in (nacre, torch.nn))
    layer.load_state_dict(reference.state_dict())
    return layer.eval(), reference.eval()


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("queries", [7, 1])
@pytest.mark.parametrize("batch_first", [True, False])
def test_small_attention_layers_without_a_backward_are_torchs(batch_first, queries, need_weights):
    layer, reference = attention_pair(batch_first=batch_first)
    tokens = torch.randn(7, 7, 32)
    query = tokens if queries == 7 else tokens[:, :1] if batch_first else tokens[:1]
    choices, found = evaluated(layer, query, tokens, tokens, need_weights=need_weights)
    assert choices == [("attention", "torch")]
    with torch.no_grad():
        expected = reference(query, tokens, tokens, need_weights=need_weights)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1]) if need_weights else found[1] is expected[1] is None


def test_other_attention_layers_are_nacres():
    layer, _ = attention_pair(batch_first=True)
    tokens, large = torch.randn(2, 7, 32), torch.randn(64, 64, 32).expand(64, 64, 32)
    mask = torch.zeros(7, 7, dtype=torch.bool)
    for given, keywords in (((tokens,) * 3, {"attn_mask": mask}), ((large,) * 3, {}), ((tokens[0],) * 3, {})):
        assert ("attention", "torch") not in evaluated(layer, *given, **keywords)[0]
    with record_choices() as choices:
        layer(tokens, tokens, tokens)  # a backward may follow
        layer.train()
        with torch.no_grad():
            layer(tokens, tokens, tokens)
    assert ("attention", "torch") not in [(choice.operator, choice.implementation) for choice in choices]
    separate, _ = attention_pair(kdim=5, vdim=6)
    assert ("attention", "torch") not in evaluated(separate, tokens, tokens[..., :5], tokens[..., :6])[0]


@pytest.mark.parametrize(
    ("query", "key", "value", "kind", "message"),
    [
        ((2, 7, 31), (2, 7, 31), (2, 7, 31), AssertionError, "embedding dimension"),
        ((2, 7, 32), (2, 7, 32), (2, 6, 32), AssertionError, "one shape"),
        ((2, 7, 32), (3, 7, 32), (3, 7, 32), RuntimeError, "one batch size"),
        ((2, 7, 32), (2, 7, 30), (2, 7, 30), RuntimeError, "in_proj_weight projects keys"),
    ],
    ids=str,
)
def test_errors_of_small_attention_layers_are_as_clear(query, key, value, kind, message):
    layer, _ = attention_pair(batch_first=True)
    with pytest.raises(kind, match=message), torch.no_grad():
        layer(*map(torch.randn, (query, key, value)))
    with pytest.raises(RuntimeError, match="one dtype"), torch.no_grad():
        layer(*[torch.randn(2, 7, 32, dtype=torch.float64)] * 3)


def encoder_pair(**arguments):
    arguments = {"batch_first": True, **arguments}
    layer, reference = (library.TransformerEncoderLayer(32, 4, 48, **arguments) for library in (nacre, torch.nn))
    layer.load_state_dict(reference.state_dict())
    return layer, reference.eval()


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_small_encoder_layers_without_a_backward_are_torchs(activation, norm_first):
    layer, reference = encoder_pair(activation=activation, norm_first=norm_first)
    tokens = torch.randn(3, 7, 32)
    choices, found = evaluated(layer, tokens)
    assert choices == [("transformer_encoder_layer", "torch")]
    with torch.no_grad():
        assert torch.equal(found, reference(tokens))


def _hooked(layer):
    layer.norm1.register_forward_hook(lambda *_: None)


def _patched(layer):
    layer.linear2.forward = lambda x: torch.zeros(*x.shape[:-1], 32)


def _replaced(layer):
    layer.linear1 = torch.nn.Sequential(layer.linear1)


def _other_activation(layer):
    layer.activation = torch.tanh


@pytest.mark.parametrize("change", [_hooked, _patched, _replaced, _other_activation])
def test_changed_encoder_layers_run_their_own_parts(change):
    layer, _ = encoder_pair()
    tokens = torch.randn(3, 7, 32)
    change(layer)
    choices, found = evaluated(layer, tokens)
    assert ("transformer_encoder_layer", "torch") not in choices
    with kernels_at_any_size():  # float32, the same sums in another order
        torch.testing.assert_close(found, evaluated(layer, tokens)[1], rtol=1e-5, atol=1e-6)


def test_other_encoder_layers_are_nacres():
    tokens, mask = torch.randn(3, 7, 32), torch.zeros(7, 7, dtype=torch.bool)
    layer, _ = encoder_pair()
    for given in ((tokens, mask), (tokens[0],), (torch.randn(256, 128, 32),)):
        assert ("transformer_encoder_layer", "torch") not in evaluated(layer, *given)[0]
    for arguments in ({"batch_first": False}, {"bias": False}, {"activation": torch.nn.functional.silu}):
        other, _ = encoder_pair(**arguments)
        assert ("transformer_encoder_layer", "torch") not in evaluated(other, tokens)[0]
    with pytest.raises(AssertionError, match="embedding dimension"):
        evaluated(layer, torch.randn(3, 7, 31))


def test_a_small_linear_is_torchs_where_no_backward_follows():
    """With one, nacre's is faster at any size: one node in place of torch's three operators and their nodes."""
    layer, input = nacre.Linear(64, 32), torch.randn(16, 64)
    with record_choices() as choices, torch.no_grad():
        found = layer(input)
    assert [choice.implementation for choice in choices] == ["torch"]
    assert torch.equal(found, torch.nn.functional.linear(input, layer.weight, layer.bias))
    with record_choices() as choices:
        layer(input).sum().backward()
        layer.requires_grad_(False)(input.requires_grad_()).sum().backward()
        layer(input.detach())
    names = [choice.implementation for choice in choices]
    assert names == ["formula" if native.unavailable() else "C++ kernel"] * 4 + ["torch"]


def test_few_tokens_of_a_small_table_are_torchs():
    layer, tokens = nacre.Embedding(50, 8, padding_idx=3), torch.randint(50, (4, 5))
    with record_choices() as choices:
        nacre.functional.embedding(tokens, layer.weight, -47)
        layer(tokens).sum().backward()
    assert [choice.implementation for choice in choices] == ["torch"] * 2
    found, layer.weight.grad = layer.weight.grad, None
    layer(tokens).sum().backward()  # where nobody asks which implementation runs
    assert torch.equal(found, layer.weight.grad) and not found[3].any()
    assert torch.equal(layer(tokens), torch.nn.functional.embedding(tokens, layer.weight, 3))
    with pytest.raises(IndexError, match="a table of 50 rows with indices from 0 to 49; got index 50 at position 1"):
        layer(torch.tensor([0, 50]))
    with record_choices() as choices:
        layer(torch.randint(50, (300,)))
        nacre.Embedding(2048, 512)(tokens)
    assert "torch" not in [choice.implementation for choice in choices]
