"""MultiheadAttention, scaled_dot_product_attention, multi_head_attention_forward: what is special to them."""

import copy
import inspect
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import bias

import nacre
from nacre.core.choice import record_choices
from nacre.core.random import keep_mask
from nacre.layers.attention.cost import cost, sizes
from tests.support import assert_as_good_as_torch, fresh, in_dtype, tensors

attention = nacre.functional.scaled_dot_product_attention
multi_head = nacre.functional.multi_head_attention_forward
CAUSAL = torch.ones(3, 3, dtype=torch.bool).triu(1)


def heads(*shape, dtype=torch.float32, seed=0, requires_grad=True):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(requires_grad)


def heads_first(tensor):
    """(N, H, L, E) as it lies in memory after a model has split its heads off by a view: (N, L, H, E)."""
    return tensor.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(tensor.requires_grad)


def results(function, arguments, keywords):
    outputs = list(tensors(function(*arguments, **keywords)))
    wanted = [t for t in tensors((arguments, keywords)) if t.requires_grad]
    cotangents = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype).reshape(t.shape) for t in outputs]
    return outputs, list(torch.autograd.grad(outputs, wanted, cotangents, allow_unused=True))


def assert_same_as_torch(ours, torchs, arguments, keywords, dtype, strides=True):
    output, gradients = results(ours, fresh(arguments), fresh(keywords))
    torchs_output, torchs_gradients = results(torchs, fresh(arguments), fresh(keywords))
    judge_output, judge_gradients = results(torchs, *in_dtype((arguments, keywords), torch.float64))
    for triple in zip(
        output + gradients, torchs_output + torchs_gradients, judge_output + judge_gradients, strict=True
    ):
        assert_as_good_as_torch(*triple, dtype, "result")
    if strides:
        assert [t.stride() for t in output if t.numel()] == [t.stride() for t in torchs_output if t.numel()]


# ---- published numbers


@pytest.mark.parametrize(("bias", "parameters"), [(False, 1_048_576), (True, 1_050_624)])
def test_parameters(bias, parameters):
    assert sum(p.numel() for p in nacre.MultiheadAttention(512, 8, bias=bias).parameters()) == parameters
    assert cost(batch=1, queries=1, keys=1, embed_dim=512, num_heads=8, bias=bias).parameters == parameters


def test_flops_of_a_vision_transformer():
    """ViT-B/16 has 197 tokens of 768 features: 0.93 GFLOP for the projections, 0.12 for the two products."""
    bill = cost(batch=1, queries=197, keys=197, embed_dim=768, num_heads=12)
    assert bill.flops == 8 * 197 * 768**2 + 4 * 197**2 * 768
    assert bill.backward_flops == 2 * bill.flops + 2 * 197**2 * 768


def test_traffic_of_the_backward_by_what_is_trained():
    # 2 x 5 tokens of 8: 80 values each of input, Q, K, V, heads and output; 64 of a projection's weight; 2 numbers for
    # each of 20 rows of scores; 50 mean weights
    layer, x = nacre.MultiheadAttention(8, 2, batch_first=True), torch.empty(2, 5, 8)

    def backward_values(trained, x):
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(name.startswith(trained))
        bill = cost(**sizes(layer, x, x, x))
        return bill.backward_bytes / 4

    everything = 80 + 3 * 80 + 40 + 80 + 80 + 50 + 4 * 64 + 80 + 3 * (64 + 8) + (64 + 8)
    assert backward_values(("in", "out"), x.clone().requires_grad_()) == everything
    assert backward_values(("in", "out"), x) == everything - 3 * 64 - 80  # neither W_in is read nor dx written
    assert backward_values((), x.clone().requires_grad_()) == 3 * 80 + 40 + 80 + 50 + 4 * 64 + 80
    assert backward_values("out", x) == 80 + 80 + (64 + 8)
    assert backward_values((), x) == 0


def test_cost_in_symbols():
    sympy = pytest.importorskip("sympy", reason="torch brings sympy, unless it was taken away")
    N, L, E, H = sympy.symbols("N L E H", positive=True)
    defaults = {name: parameter.default for name, parameter in inspect.signature(cost).parameters.items()}
    flags = {name: int(value) for name, value in defaults.items() if isinstance(value, bool)}
    bill = cost(batch=N, queries=L, keys=L, embed_dim=E, num_heads=H, **flags)
    assert sympy.expand(bill.flops - (8 * N * L * E**2 + 4 * N * L**2 * E)) == 0
    assert sympy.expand(bill.saved_bytes - (4 * 5 * N * L * E + 8 * N * H * L)) == 0


# ---- scaled_dot_product_attention against torch's

Q, K, V = heads(2, 4, 3, 6), heads(2, 4, 5, 6, seed=1), heads(2, 4, 5, 6, seed=2)
MASK = heads(3, 5, seed=3)
SEEN = torch.rand(2, 1, 3, 5, generator=torch.Generator().manual_seed(4)) > 0.6
BLIND = torch.tensor([[True, False, True, True, False], [False] * 5, [True] * 5])
CALLS = {
    "4-d": ((Q, K, V), {}),
    "heads split off by a view": ((heads_first(Q), heads_first(K), heads_first(V)), {}),
    "3-d": ((Q[0].detach().requires_grad_(), K[0], V[0]), {}),
    "2-d": ((heads(3, 6), heads(5, 6, seed=1), heads(5, 6, seed=2)), {}),
    "5-d": ((heads(1, 2, 2, 3, 6), heads(1, 2, 2, 5, 6, seed=1), heads(1, 2, 2, 5, 6, seed=2)), {}),
    "values of another width": ((Q, K, heads(2, 4, 5, 7, seed=2)), {}),
    "one feature": ((heads(2, 4, 3, 1), heads(2, 4, 5, 1, seed=1), heads(2, 4, 5, 1, seed=2)), {}),
    "no features": ((heads(2, 4, 3, 0), heads(2, 4, 5, 0, seed=1), V), {}),
    "one query batch": ((heads(1, 4, 3, 6), K, V), {}),
    "one key batch": ((Q, heads(1, 4, 5, 6, seed=1), heads(1, 4, 5, 6, seed=2)), {}),
    "values of more batches": ((heads(1, 4, 3, 6), heads(1, 4, 5, 6, seed=1), V), {}),
    "values of more batches and a mask": ((heads(1, 4, 3, 6), heads(1, 4, 5, 6, seed=1), V, MASK), {}),
    "keys of fewer dimensions": ((Q, heads(5, 6, seed=1), heads(5, 6, seed=2)), {}),
    "queries of fewer dimensions": ((heads(3, 6), K, V), {}),
    "causal, more keys": ((Q, K, V), {"is_causal": True}),
    "causal, fewer keys": ((K, Q, Q), {"is_causal": True}),
    "mask of numbers": ((Q, K, V, MASK), {}),
    "mask of each head": ((Q, K, V, heads(2, 4, 3, 5, seed=3)), {}),
    "mask of each key": ((Q, K, V, heads(4, 1, 5, seed=3)), {}),
    "bool mask": ((Q, K, V, SEEN), {}),
    "a blind query": ((Q, K, V, BLIND), {}),
    "a blind query, 3-d": ((heads(4, 3, 6), heads(4, 5, 6, seed=1), heads(4, 5, 6, seed=2), BLIND), {}),
    "a query blinded by -inf": ((Q, K, V, torch.zeros(3, 5).masked_fill(~BLIND, -math.inf)), {}),
    "causal and a mask": ((Q, K, V, BLIND), {"is_causal": True}),
    "NaN mask": ((Q, K, V, torch.full((3, 5), math.nan)), {}),
    "scale": ((Q, K, V), {"scale": 0.3}),
    "scale 0": ((Q, K, V), {"scale": 0.0}),
    "negative scale": ((Q, K, V), {"scale": -0.5}),
    "no keys": ((Q, heads(2, 4, 0, 6), heads(2, 4, 0, 6)), {}),
    "no queries": ((heads(2, 4, 0, 6), K, V), {}),
    "no batch": ((heads(0, 4, 3, 6), heads(0, 4, 5, 6), heads(0, 4, 5, 6)), {}),
    "dropout of all": ((Q, K, V), {"dropout_p": 1.0}),
    "grouped queries": ((Q, heads(2, 2, 5, 6, seed=1), heads(2, 2, 5, 6, seed=2)), {"enable_gqa": True}),
    "one key head": ((Q, heads(2, 1, 5, 6, seed=1), heads(2, 1, 5, 6, seed=2), MASK), {"enable_gqa": True}),
    "grouped, 3-d": ((heads(4, 3, 6), heads(2, 5, 6, seed=1), heads(2, 5, 6, seed=2)), {"enable_gqa": True}),
    "grouped, one batch of keys": ((Q, heads(1, 2, 5, 6), heads(1, 2, 5, 6, seed=2)), {"enable_gqa": True}),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_attention_is_torchs(name, dtype):
    arguments, keywords = in_dtype(CALLS[name], dtype)
    assert_same_as_torch(attention, F.scaled_dot_product_attention, arguments, keywords, dtype)


@pytest.mark.parametrize(
    "name", ["4-d", "values of more batches and a mask", "a blind query", "grouped, one batch of keys", "no features"]
)
def test_attention_derivatives(name):
    arguments, keywords = in_dtype(CALLS[name], torch.float64)
    free = [t for t in arguments if t.requires_grad]
    rest = [t for t in arguments if not t.requires_grad]
    function = lambda *values: attention(*values, *rest, **keywords)
    assert torch.autograd.gradcheck(function, free, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, free, check_fwd_over_rev=True, fast_mode=True)


def test_different_heads_of_keys_and_values():
    """torch's fused kernel reads keys and values as if both had as many heads; its documented meaning is repetition."""
    query, key, value = heads(1, 4, 3, 6), heads(1, 2, 5, 6), heads(1, 4, 5, 6)
    expected = F.scaled_dot_product_attention(query, key.repeat_interleave(2, 1), value)
    torch.testing.assert_close(attention(query, key, value, enable_gqa=True), expected)


def test_a_mask_in_float32_beside_half_precision():
    arguments = (*in_dtype((Q, K, V), torch.bfloat16), MASK)
    mask_gradient = torch.autograd.grad(attention(*arguments).sum(), MASK)[0]
    assert mask_gradient.dtype is torch.float32
    torch.testing.assert_close(
        attention(*arguments), F.scaled_dot_product_attention(*arguments), rtol=2**-7, atol=2**-7
    )


def test_large_scores():
    """softmax of (10000, 10000, -10000) is (1/2, 1/2, 0), with weights that sum to 1 to the last bit."""
    query, key = torch.tensor([[100.0]]), torch.tensor([[100.0], [100.0], [-100.0]])
    assert attention(query, key, torch.tensor([[1.0], [3.0], [math.pi]])).item() == 2.0


def test_large_scores_leave_gradients_that_cancel():
    """A constant added to all scores of a query changes nothing: their gradients sum to 0, though l is rounded."""
    mask = torch.full((3, 5), 1000.0, requires_grad=True)
    gradient = torch.autograd.grad(attention(Q, K, V, mask), mask, heads(2, 4, 3, 6, seed=5))[0]
    assert gradient.abs().max() > 0.1
    # l near 1000 is rounded to 3e-5 of its weights; 40 terms of about 1, rounded to 6e-8 each, must not show it
    assert gradient.sum(-1).abs().max() < 3e-6


def test_one_clear_winner_leaves_no_gradient():
    """Where a query attends to one key alone, half precision must not invent a gradient of the scores."""
    query = torch.tensor([[30.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    key = torch.tensor([[30.0, 0.0], [-30.0, 0.0]], dtype=torch.bfloat16)
    value = torch.tensor([[1.2345, -0.777], [0.3, 0.1]], dtype=torch.bfloat16)
    output = attention(query, key, value)
    assert torch.autograd.grad(output, query, torch.full_like(output, 3.3))[0].abs().max() == 0


def test_nothing_of_the_size_of_the_scores_is_kept():
    query, key = heads(1, 2, 64, 4), heads(1, 2, 96, 4)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        attention(query, key, key, dropout_p=0.5)
    assert max(tensor.numel() for tensor in kept) == key.numel()
    maxima_and_sums, seed = 2 * 2 * 64, 1
    assert sum(tensor.numel() for tensor in kept) == query.numel() + 2 * key.numel() + maxima_and_sums + seed


@pytest.mark.parametrize(
    ("keywords", "dynamic"), [({"is_causal": True}, True), ({"attn_mask": BLIND[:1]}, False)], ids=["causal", "mask"]
)
def test_compiled(keywords, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (3, 5):
        arguments = (heads_first(heads(2, 4, length, 6)), K, V)
        ours = results(compiled, arguments, keywords)
        expected = results(attention, arguments, keywords)
        assert [t.stride() for t in ours[0]] == [t.stride() for t in expected[0]]
        for one, other in zip(tensors(ours), tensors(expected), strict=True):
            torch.testing.assert_close(one, other)


def test_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(Q, K, V, MASK).dtype is torch.bfloat16
        assert attention(*in_dtype((Q, K, V), torch.float64)).dtype is torch.float64
        output, weights = nacre.MultiheadAttention(6, 2)(heads(3, 2, 6), heads(3, 2, 6), heads(3, 2, 6))
        assert output.dtype is weights.dtype is torch.bfloat16


def test_a_mask_of_torchs_own_type_is_left_to_torch():
    mask = bias.causal_lower_right(3, 5)
    with record_choices() as choices:
        output = attention(Q, K, V, mask)
    assert [str(choice) for choice in choices] == ["attention: torch (a mask of type CausalBias)"]
    torch.testing.assert_close(output, F.scaled_dot_product_attention(Q, K, V, mask))


# ---- dropout


def test_dropout_is_the_mask_of_its_seed():
    torch.manual_seed(3)
    output = attention(Q, K, V, dropout_p=0.4)
    torch.manual_seed(3)
    seed = torch.randint(0, 2**63 - 1, ())
    weights = (Q @ K.mT / math.sqrt(6)).softmax(-1)
    expected = torch.where(keep_mask(seed, (2, 4, 3, 5), 0.4), weights / 0.6, 0) @ V
    torch.testing.assert_close(output, expected)
    # the backward draws the same mask again
    gradients = torch.autograd.grad(output.sin().sum(), (Q, K, V))
    for one, other in zip(gradients, torch.autograd.grad(expected.sin().sum(), (Q, K, V)), strict=True):
        torch.testing.assert_close(one, other)


def test_dropout_keeps_the_mean():
    torch.manual_seed(0)
    query = torch.zeros(64, 100, 1)
    output = attention(query, query, torch.ones(64, 100, 1), dropout_p=0.3)
    # 640,000 weights of 1/100, each kept with probability 0.7: the mean over 6,400 rows is off by 8e-4 (1 sigma)
    assert output.mean().item() == pytest.approx(1, abs=4e-3)
    assert output.std().item() == pytest.approx(math.sqrt(0.3 / 0.7 / 100), rel=0.05)  # 6,400 rows: 1 % (1 sigma)


def test_returned_weights_are_those_after_dropout():
    layer = nacre.MultiheadAttention(4, 1, dropout=0.5, bias=False)
    with torch.no_grad():
        layer.in_proj_weight.copy_(torch.eye(4).repeat(3, 1))
        layer.out_proj.weight.copy_(torch.eye(4))
    tokens = heads(8, 1, 4)
    output, weights = layer(tokens, tokens, tokens)
    assert 0.2 < (weights == 0).float().mean() < 0.8
    torch.testing.assert_close(weights[0] @ tokens[:, 0], output[:, 0])


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_dropout_in_vmap(randomness):
    query = heads(4, 3, 6, requires_grad=False).expand(2, 4, 3, 6)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(lambda rows: attention(rows, rows, rows, dropout_p=0.5))(query)
    function = torch.vmap(lambda rows: attention(rows, rows, rows, dropout_p=0.5), randomness=randomness)
    output = function(query)
    assert torch.equal(output[0], output[1]) == (randomness == "same")


# ---- MultiheadAttention and multi_head_attention_forward


def pair(**arguments):
    layer = nacre.MultiheadAttention(**{"embed_dim": 4, "num_heads": 2, **arguments})
    return layer, nacre.convert(copy.deepcopy(layer), to="torch")


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("static", [("k",), ("v",), ("k", "v")], ids="".join)
@pytest.mark.parametrize("zero_attn", [False, True])
def test_static_keys_and_values(static, zero_attn, need_weights):
    tokens = heads(3, 2, 4, dtype=torch.float64)
    weights = [heads(*shape, dtype=torch.float64, seed=i) for i, shape in enumerate([(12, 4), (12,), (4, 4), (4,)])]
    keywords = {f"static_{name}": heads(4, 3, 2, dtype=torch.float64, seed=7) for name in static}
    keywords |= {"need_weights": need_weights, "key_padding_mask": torch.tensor([[False, False, True]] * 2)}
    arguments = (tokens, tokens, tokens, 4, 2, *weights[:2], None, None, zero_attn, 0.0, *weights[2:])
    assert_same_as_torch(multi_head, F.multi_head_attention_forward, arguments, keywords, torch.float64)


def test_gradient_of_the_weights_alone():
    layer, reference = pair(dtype=torch.float64)
    tokens = heads(3, 2, 4, dtype=torch.float64)
    gradients = []
    for module in (layer, reference):
        _, weights = module(tokens, tokens, tokens, average_attn_weights=False)
        gradients.append(torch.autograd.grad(weights.sin().sum(), (tokens, module.in_proj_weight)))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("need_weights", [True, False])
def test_the_hint_replaces_the_mask_only_where_torch_lets_it(need_weights):
    """A wrong hint shows which of the two was followed."""
    layer, reference = pair()
    tokens = heads(3, 2, 4)
    keywords = {"attn_mask": CAUSAL.T, "is_causal": True, "need_weights": need_weights}
    torch.testing.assert_close(layer(tokens, tokens, tokens, **keywords), reference(tokens, tokens, tokens, **keywords))


def test_hooks_of_the_output_projection_stay_silent():
    """As in torch.nn, which reads the projection's weights and never calls it."""
    layer, _ = pair()
    layer.out_proj.register_forward_hook(lambda *_: pytest.fail("out_proj was called"))
    assert type(layer.out_proj) is torch.nn.modules.linear.NonDynamicallyQuantizableLinear
    layer(*[heads(3, 2, 4)] * 3)


def test_inference_returns_what_torchs_fast_path_returns():
    layer, reference = pair(batch_first=True)
    tokens = heads(2, 3, 4, requires_grad=False)
    with torch.no_grad():
        found, expected = (module.eval()(tokens, tokens, tokens) for module in (layer, reference))
    assert [t.stride() for t in found] == [t.stride() for t in expected]
    torch.testing.assert_close(found, expected)


def test_nested_tensors_are_left_to_torch():
    layer, reference = pair(batch_first=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        nested = torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(2, 4)])
    with torch.no_grad(), record_choices() as choices:
        found, expected = (
            module.eval()(nested, nested, nested, need_weights=False)[0] for module in (layer, reference)
        )
    assert [str(choice) for choice in choices] == ["attention: torch (a nested tensor)"]
    torch.testing.assert_close(found.to_padded_tensor(0.0), expected.to_padded_tensor(0.0))
    with pytest.raises(AssertionError, match="NestedTensor"):
        layer.train()(nested, nested, nested)


def test_inside_torchs_encoder():
    encoder = torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2
    ).eval()
    tokens, padding = heads(2, 3, 8, requires_grad=False), torch.tensor([[False] * 3, [False, True, True]])
    with torch.no_grad():
        expected = encoder(tokens, src_key_padding_mask=padding)
        for block in encoder.layers:
            nacre.convert(block.self_attn)
            assert type(block.self_attn) is nacre.MultiheadAttention
        found = encoder(tokens, src_key_padding_mask=padding)
    torch.testing.assert_close(found, expected)


def test_old_checkpoints_load():
    layer, _ = pair()
    state = copy.copy(layer.__dict__)
    del state["_qkv_same_embed_dim"]
    layer.__setstate__(state)
    assert layer._qkv_same_embed_dim


def test_a_bias_of_another_dtype_is_left_to_torch():
    results = []
    for kind in (nacre.MultiheadAttention, torch.nn.MultiheadAttention):
        torch.manual_seed(0)
        layer = kind(4, 2, batch_first=True, dtype=torch.float64)
        layer.in_proj_bias = torch.nn.Parameter(layer.in_proj_bias.half())
        results.append(layer(*(heads(3, 2, 4, dtype=torch.float64, requires_grad=False),) * 3)[0])
    assert torch.equal(*results)
