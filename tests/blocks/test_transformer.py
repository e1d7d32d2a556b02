"""TransformerBlock against a plain rewriting with torch.nn, TransformerEncoderLayer against torch.nn's own."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import nacre
from nacre.core import native
from nacre.core.choice import record_choices


class Plain(nn.Module):
    """The formula of TransformerBlock, with torch.nn's layers and the whole causal mask."""

    def __init__(self, dim, heads, ratio=4, causal=False, norm_first=True, bias=True, eps=1e-5, activation=nn.GELU):
        super().__init__()
        self.causal, self.norm_first = causal, norm_first
        self.norm1 = nn.LayerNorm(dim, eps=eps, bias=bias)
        self.attn = nn.MultiheadAttention(dim, heads, bias=bias, batch_first=True)
        self.norm2 = nn.LayerNorm(dim, eps=eps, bias=bias)
        self.ff = nn.Sequential(nn.Linear(dim, ratio * dim, bias), activation(), nn.Linear(ratio * dim, dim, bias))

    def attend(self, x, mask, padding):
        # as numbers, which any two masks can be added to
        hidden = torch.zeros(x.shape[-2], x.shape[-2], dtype=x.dtype)
        if self.causal:
            hidden = hidden.masked_fill(torch.ones_like(hidden).triu(1) > 0, -torch.inf)
        if mask is not None:
            hidden = hidden + (
                hidden.new_zeros(mask.shape).masked_fill(mask, -torch.inf) if mask.dtype is torch.bool else mask
            )
        if padding is not None and padding.dtype is torch.bool:
            padding = x.new_zeros(padding.shape).masked_fill(padding, -torch.inf)
        return self.attn(x, x, x, key_padding_mask=padding, attn_mask=hidden)[0]

    def forward(self, x, mask=None, padding=None):
        if self.norm_first:
            x = x + self.attend(self.norm1(x), mask, padding)
            return x + self.ff(self.norm2(x))
        x = self.norm1(x + self.attend(x, mask, padding))
        return self.norm2(x + self.ff(x))


def assert_same_results(ours, theirs, inputs, others=()):
    """Output and every gradient in float64, where a few dozen terms are summed in another order."""
    given, same = (tuple(t.detach().clone().requires_grad_() for t in inputs) for _ in range(2))
    found, expected = ours(*given, *others), theirs(*same, *others)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    found.pow(2).sum().backward(), expected.pow(2).sum().backward()
    for one, other in zip(given, same, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-11)
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-11, msg=lambda text, n=name: f"{n}: {text}")


def both(dim=8, heads=2, **options):
    torch.manual_seed(0)
    names = {"activation": {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU}.get(options.get("activation"), nn.GELU)}
    block = nacre.TransformerBlock(dim, heads, **options).double()
    kept = {name: value for name, value in options.items() if name not in ("activation", "mlp_ratio", "dropout")}
    plain = Plain(dim, heads, options.get("mlp_ratio", 4), **kept, **names).double()
    for parameter in block.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    plain.load_state_dict(block.state_dict())
    return block, plain


def operators(block):
    first = {"layer_norm", "residual_dropout"} if block.norm_first else set()
    return first | {"attention", "linear", "feed_forward", "residual_dropout_layer_norm"}


def tokens(*shape):
    return torch.randn(shape, dtype=torch.float64)


BOOL_MASK = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 1], [1, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.bool)
NUMBERS = torch.tensor([[0.0, 1.0, -2.0, 0.5]] * 4, dtype=torch.float64)
PADDING = torch.tensor([[False, False, False, True], [False] * 4, [False, False, True, True]])
MASKS = {
    "none": (None, None),
    "bool": (BOOL_MASK, None),
    "numbers": (NUMBERS, None),
    "padding": (None, PADDING),
    "padding in numbers": (None, torch.zeros(3, 4).double().masked_fill(PADDING, -torch.inf)),
    "bool and padding": (BOOL_MASK, PADDING),
    "a mask for each head": (BOOL_MASK.repeat(6, 1, 1), None),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("causal", "norm_first"), list(itertools.product([False, True], repeat=2)))
def test_block_equals_its_formula(causal, norm_first, name):
    block, plain = both(causal=causal, norm_first=norm_first)
    assert_same_results(block, plain, (tokens(3, 4, 8),), MASKS[name])


@pytest.mark.parametrize(
    "options",
    [{"bias": False}, {"eps": 0.1}, {"mlp_ratio": 2}, {"activation": "relu"}, {"activation": "silu"}],
    ids=str,
)
def test_block_options(options):
    block, plain = both(**options)
    assert_same_results(block, plain, (tokens(3, 4, 8),))


def test_block_takes_a_single_sequence():
    block, plain = both(causal=True)
    x = tokens(4, 8)
    assert_same_results(block, plain, (x,))
    # float64 sums of a few dozen terms
    torch.testing.assert_close(block(x), block(x[None])[0], rtol=1e-11, atol=1e-13)
    padding = torch.tensor([False, False, True, True])
    torch.testing.assert_close(block(x, None, padding)[:2], block(x[:2]), rtol=1e-11, atol=1e-13)


def test_a_learned_mask_has_its_gradient():
    block, plain = both(causal=True)
    assert_same_results(block, plain, (tokens(3, 4, 8), NUMBERS))


@pytest.mark.skipif(bool(native.unavailable()), reason=native.unavailable())
def test_a_causal_block_makes_no_matrix_of_tokens_by_tokens():
    block, largest = nacre.TransformerBlock(8, 2, causal=True), 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            nonlocal largest
            found = function(*arguments, **(keywords or {}))
            for tensor in found if isinstance(found, tuple) else (found,):
                largest = max(largest, tensor.untyped_storage().nbytes())
            return found

    x = torch.randn(1, 512, 8)
    with Watch():
        block(x)
    assert 0 < largest < 512 * 512


@pytest.mark.parametrize("given", MASKS)
def test_causal_blocks_see_no_later_token(given):
    block, _ = both(causal=True)
    x = tokens(3, 4, 8)
    changed = x.clone()
    changed[:, 2:] = 99.0
    mask, padding = MASKS[given]
    if padding is not None and padding[:, 0].any():
        return
    first, second = block(x, mask, padding), block(changed, mask, padding)
    assert torch.equal(first[:, :2], second[:, :2])
    assert not torch.equal(first[:, 2:], second[:, 2:])


def test_dropout_of_a_block():
    block = nacre.TransformerBlock(8, 2, dropout=0.5)
    x = torch.randn(3, 4, 8)
    torch.manual_seed(3)
    first = block(x)
    torch.manual_seed(3)
    assert torch.equal(first, block(x))
    assert not torch.equal(first, block(x))
    block.eval()
    assert torch.equal(block(x), block(x))
    assert not torch.equal(first, block(x))


def test_block_runs_on_nacre_and_after_conversion_on_torch():
    for options in ({}, {"causal": True}, {"norm_first": False, "causal": True}):
        block, _ = both(**options)
        x = tokens(3, 4, 8)
        with record_choices() as choices:
            ours = block(x), block(x, NUMBERS, None)
        assert {choice.operator for choice in choices} == operators(block)
        nacre.convert(block, to="torch")
        assert {type(part).__module__.split(".")[0] for part in block.modules()} == {"torch", "nacre"}
        assert not [part for part in block.modules() if type(part).__module__.startswith("nacre.layers")]
        for training in (True, False):
            block.train(training)
            with record_choices() as choices, torch.set_grad_enabled(training):
                torchs = block(x), block(x, NUMBERS, None)
            assert choices == []
            # float64 sums of a few dozen terms
            torch.testing.assert_close(ours, torchs, rtol=1e-10, atol=1e-12)
        nacre.convert(block)
        assert isinstance(block.attn, nacre.MultiheadAttention)
        torch.testing.assert_close(block(x), ours[0], rtol=0, atol=0)


def test_block_parameters():
    def count(**options):
        return sum(p.numel() for p in nacre.TransformerBlock(16, 4, **options).parameters())

    assert count(bias=False) == (4 + 2 * 4) * 16**2 + 2 * 16
    assert count() == (4 + 2 * 4) * 16**2 + 4 * 16 + (4 + 1) * 16 + 4 * 16
    assert count(mlp_ratio=2, bias=False) == (4 + 2 * 2) * 16**2 + 2 * 16
    block = nacre.TransformerBlock(16, 4, device="meta", dtype=torch.float16)
    assert all(p.is_meta and p.dtype is torch.float16 for p in block.parameters())


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"activation": "sine"}, ValueError, "one of gelu.*'sine'"),
        ({"mlp_ratio": 0}, ValueError, "mlp_ratio = 0"),
        ({"num_heads": 3}, AssertionError, "divisible"),
        ({"dropout": 1.5}, ValueError, "probability"),
    ],
)
def test_block_errors(options, kind, message):
    with pytest.raises(kind, match=message):
        nacre.TransformerBlock(**{"dim": 8, "num_heads": 2, **options})


# ---- TransformerEncoderLayer


def pair(**options):
    options = {"d_model": 8, "nhead": 2, "dim_feedforward": 12, "dropout": 0.0, "batch_first": True, **options}
    torch.manual_seed(0)
    ours = nacre.TransformerEncoderLayer(**options).double()
    for parameter in ours.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    theirs = nn.TransformerEncoderLayer(**options).double()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("norm_first", [False, True])
def test_layer_equals_torchs(norm_first, name):
    ours, theirs = pair(norm_first=norm_first)
    assert_same_results(ours, theirs, (tokens(3, 4, 8),), MASKS[name])


@pytest.mark.parametrize(
    "activation",
    ["relu", "gelu", nn.functional.gelu, nn.functional.silu, torch.tanh, nn.ReLU(), nn.GELU("tanh"), lambda x: x.sin()],
    ids=["relu", "gelu", "F.gelu", "F.silu", "torch.tanh", "nn.ReLU", "nn.GELU", "a lambda"],
)
def test_layer_takes_any_activation(activation):
    ours, theirs = pair(activation=copy.deepcopy(activation) if isinstance(activation, nn.Module) else activation)
    assert_same_results(ours, theirs, (tokens(3, 4, 8),))


@pytest.mark.parametrize("options", [{"bias": False}, {"batch_first": False}, {"layer_norm_eps": 0.1}], ids=str)
def test_layer_options(options):
    ours, theirs = pair(**options)
    assert_same_results(ours, theirs, (tokens(3, 4, 8),))
    assert_same_results(ours, theirs, (tokens(4, 8),))


@pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")  # of torch, which both sides give
def test_causal_hint():
    ours, theirs = pair()
    mask = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)
    assert_same_results(ours, theirs, (tokens(3, 4, 8),), (mask, None, True))
    assert_same_results(ours, theirs, (tokens(3, 4, 8),), (mask, PADDING, True))


def test_its_children_are_nacres():
    layer, _ = pair(activation=nn.GELU())
    kinds = {name: type(child) for name, child in layer.named_children()}
    assert kinds == {
        "self_attn": nacre.MultiheadAttention,
        "linear1": nacre.Linear,
        "dropout": nacre.Dropout,
        "linear2": nacre.Linear,
        "norm1": nacre.LayerNorm,
        "norm2": nacre.LayerNorm,
        "dropout1": nacre.Dropout,
        "dropout2": nacre.Dropout,
        "activation": nacre.GELU,
    }
    converted = nacre.convert(nn.TransformerEncoderLayer(8, 2))
    assert {type(child) for child in converted.children()} <= set(kinds.values())
    for name in ("relu", "gelu"):
        layer, _ = pair(activation=name)
        with record_choices() as choices:
            layer(tokens(3, 4, 8))
        assert {choice.operator for choice in choices} == operators(layer)


@pytest.mark.parametrize("norm_first", [False, True])
def test_evaluation_takes_no_fused_path(norm_first):
    """torch's layer, in evaluation without gradients, runs one fused operator; ours runs the layers of nacre."""
    ours, theirs = pair(norm_first=norm_first, activation="relu")
    ours.eval(), theirs.eval()
    x = tokens(3, 4, 8)
    for padding in (None, PADDING):
        with torch.no_grad(), record_choices() as choices:
            found = ours(x, src_key_padding_mask=padding)
        assert {choice.operator for choice in choices} == operators(ours)
        with torch.no_grad():
            expected = theirs(x, src_key_padding_mask=padding)
        kept = slice(None) if padding is None else ~padding  # torch's fused path writes zeros for padding
        # float64 sums of a few dozen terms
        torch.testing.assert_close(found[kept], expected[kept], rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")  # torch tells why it does not nest
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_inside_torchs_encoder(norm_first, training, nested):
    ours, theirs = (
        nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(8).double(), enable_nested_tensor=nested).train(training)
        for layer in pair(norm_first=norm_first)
    )
    assert all(type(layer) is nacre.TransformerEncoderLayer for layer in ours.layers)
    x = tokens(3, 4, 8)
    for padding in (None, PADDING):
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients), record_choices() as choices:
                found = ours(x, src_key_padding_mask=padding)
            with torch.set_grad_enabled(gradients):
                expected = theirs(x, src_key_padding_mask=padding)
            fast = nested and not training and not gradients and not norm_first and padding is not None
            assert fast == any(choice.implementation == "torch" for choice in choices)
            assert found.shape == expected.shape
            # what stands at padding is zero in some of torch's paths and anything in others
            kept = slice(None) if padding is None else ~padding
            torch.testing.assert_close(found[kept], expected[kept], rtol=1e-9, atol=1e-11)


def test_layer_dropout_copies_and_pickles():
    layer = nacre.TransformerEncoderLayer(8, 2, 12, dropout=0.5, batch_first=True)
    x = torch.randn(3, 4, 8)
    results = []
    for one in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.manual_seed(3)
        results.append(one(x))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert not torch.equal(layer(x), layer(x))


def test_layer_errors_are_torchs():
    for arguments, kind in (({"nhead": 3}, AssertionError), ({"activation": "sine"}, RuntimeError)):
        with pytest.raises(kind):
            nacre.TransformerEncoderLayer(**{"d_model": 8, "nhead": 2, **arguments})
        with pytest.raises(kind):
            nn.TransformerEncoderLayer(**{"d_model": 8, "nhead": 2, **arguments})
    ours, theirs = pair()
    bad = (
        (tokens(3, 4, 7), {}),
        (tokens(3, 4, 8), {"src_mask": torch.zeros(3, 3, dtype=torch.bool)}),
        (tokens(3, 4, 8), {"src_mask": torch.zeros(4, 4, dtype=torch.int64)}),
        (tokens(3, 4, 8), {"src_key_padding_mask": torch.zeros(3, 5, dtype=torch.bool)}),
        (tokens(3, 4, 8), {"is_causal": True}),
    )
    for x, keywords in bad:
        with pytest.raises((RuntimeError, AssertionError)) as found:
            ours(x, **keywords)
        with pytest.raises((RuntimeError, AssertionError)) as expected:
            theirs(x, **keywords)
        assert found.type is expected.type


def test_compiled_blocks():
    for make in (
        lambda: nacre.TransformerBlock(8, 2, causal=True),
        lambda: nacre.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True),
    ):
        torch._dynamo.reset()
        block = make()
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        x = torch.randn(3, 4, 8, requires_grad=True)
        padding = PADDING[:, :4]
        keywords = {
            "key_padding_mask" if isinstance(block, nacre.TransformerBlock) else "src_key_padding_mask": padding
        }
        # the same operators run
        torch.testing.assert_close(compiled(x, **keywords), block(x, **keywords), rtol=1e-5, atol=1e-6)
        compiled(x).sum().backward()
        assert x.grad.isfinite().all()
