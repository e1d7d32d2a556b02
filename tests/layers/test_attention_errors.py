"""Errors of attention: torch's type, and a message with what came."""

import pytest
import torch
import torch.nn.functional as F

import nacre

attention = nacre.functional.scaled_dot_product_attention
X = torch.randn(3, 2, 4)
Q, K, V = torch.randn(2, 4, 3, 6), torch.randn(2, 4, 5, 6), torch.randn(2, 4, 5, 6)
CAUSAL = torch.ones(3, 3, dtype=torch.bool).triu(1)
MASK, BLIND = torch.randn(3, 5), torch.ones(3, 5, dtype=torch.bool)


def pair(**options):
    return nacre.MultiheadAttention(4, 2, **options), torch.nn.MultiheadAttention(4, 2, **options)


BAD_LAYERS = {
    "embed_dim = 7 and num_heads = 2": ({"embed_dim": 7}, AssertionError),
    "num_heads=0": ({"num_heads": 0}, ValueError),
}
BAD_CALLS = {
    "a query of shape (4,)": ((X[0, 0], X, X), {}, AssertionError),
    "key (3, 4)": ((X, X[:, 0], X[:, 0]), {}, AssertionError),
    "and 3 features": ((X[..., :3], X, X), {}, AssertionError),
    "Did you mean embed_dim = 3": ((X[..., :3],) * 3, {}, AssertionError),
    "a value of length 2": ((X, X, X[:2]), {}, AssertionError),
    "need kdim and vdim": ((X, X[..., :3], X[..., :3]), {}, RuntimeError),
    "batch size 1": ((X, X[:, :1], X[:, :1]), {}, RuntimeError),
    "attn_mask of shape (3,)": ((X, X, X), {"attn_mask": CAUSAL[0]}, AssertionError),
    "attn_mask of shape (2, 3)": ((X, X, X), {"attn_mask": CAUSAL[:2]}, RuntimeError),
    "here (4, 3, 3)": ((X, X, X), {"attn_mask": CAUSAL.expand(3, 3, 3)}, RuntimeError),
    "Did you mean key_padding_mask.T": ((X, X, X), {"key_padding_mask": CAUSAL[:2].T}, AssertionError),
    "Did you mean attn_mask.bool()": ((X, X, X), {"attn_mask": CAUSAL.long()}, AssertionError),
    "key_padding_mask of dtype torch.uint8": ((X, X, X), {"key_padding_mask": CAUSAL[:2].byte()}, AssertionError),
    "a mask of dtype torch.float64": ((X, X, X), {"attn_mask": CAUSAL.double()}, RuntimeError),
    "is_causal=True without attn_mask": ((X, X, X), {"is_causal": True}, RuntimeError),
    "query of dtype torch.float64": ((X.double(),) * 3, {}, RuntimeError),
    "query of device meta": ((X.to("meta"),) * 3, {}, RuntimeError),
}
BAD_ATTENTION = {
    "query (6,)": ((Q[0, 0, 0], K, V), {}, RuntimeError),
    "query (2, 4, 3, 6), key (2, 4, 5, 3)": ((Q, K[..., :3], V), {}, RuntimeError),
    "key (4, 5, 6), value (4, 4, 6)": ((Q[0], K[0], V[0, :, :4]), {}, RuntimeError),
    "Did you mean enable_gqa=True": ((Q, K[:, :2], V[:, :2]), {}, RuntimeError),
    "4 heads in query, 3 in key and 3 in value": ((Q, K[:, :3], V[:, :3]), {"enable_gqa": True}, RuntimeError),
    "heads in dimension -3": ((Q[0, 0], K[0, 0], V[0, 0]), {"enable_gqa": True}, IndexError),
    "attn_mask of shape (3, 4)": ((Q, K, V, MASK[:, :4]), {}, RuntimeError),
    "attn_mask of shape (1, 1, 1, 3, 5)": ((Q, K, V, MASK[None, None, None]), {}, RuntimeError),
    "a mask of dtype torch.int64": ((Q, K, V, BLIND.long()), {}, RuntimeError),
    "a mask of dtype torch.bfloat16": ((Q, K, V, MASK.bfloat16()), {}, RuntimeError),
    "is_causal=True and attn_mask": ((Q[0], K[0], V[0], BLIND), {"is_causal": True}, RuntimeError),
    "dropout_p = 1.5": ((Q, K, V), {"dropout_p": 1.5}, RuntimeError),
    "dropout_p = -0.1": ((Q, K, V), {"dropout_p": -0.1}, RuntimeError),
    "key of dtype torch.float64": ((Q, K.double(), V), {}, RuntimeError),
    "query of device meta": ((Q.to("meta"), K, V), {}, RuntimeError),
}


def assert_both_raise(kind, message, ours, torchs):
    for function in (ours, torchs):
        with pytest.raises(kind) as caught:
            function()
        assert type(caught.value) is kind
        if function is ours:
            assert message in str(caught.value)


@pytest.mark.parametrize("message", BAD_LAYERS)
def test_bad_layers(message):
    arguments, kind = BAD_LAYERS[message]
    arguments = {"embed_dim": 4, "num_heads": 2, **arguments}
    assert_both_raise(
        kind, message, lambda: nacre.MultiheadAttention(**arguments), lambda: torch.nn.MultiheadAttention(**arguments)
    )


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_calls(message):
    arguments, keywords, kind = BAD_CALLS[message]
    layer, reference = pair()
    assert_both_raise(kind, message, lambda: layer(*arguments, **keywords), lambda: reference(*arguments, **keywords))


@pytest.mark.parametrize("message", BAD_ATTENTION)
def test_bad_attention(message):
    arguments, keywords, kind = BAD_ATTENTION[message]
    ours = lambda: attention(*arguments, **keywords)
    assert_both_raise(kind, message, ours, lambda: F.scaled_dot_product_attention(*arguments, **keywords))


@pytest.mark.parametrize(("need_weights", "kind"), [(True, ValueError), (False, RuntimeError)])
def test_dropout_that_is_no_probability(need_weights, kind):
    layer, reference = pair(dropout=1.5)
    assert_both_raise(
        kind,
        "dropout_p = 1.5",
        lambda: layer(X, X, X, need_weights=need_weights),
        lambda: reference(X, X, X, need_weights=need_weights),
    )
    assert layer.eval()(X, X, X)[0].isfinite().all()


FLAT = X[:, 0]
IN_TORCHS_WORDS = {
    "query 1-D": ((FLAT[0], FLAT, FLAT), {}),
    "key 2-D": ((X, FLAT, X), {}),
    "value 3-D": ((FLAT, FLAT, X), {}),
    "padding 1-D": ((X, X, X), {"key_padding_mask": CAUSAL[0]}),
    "padding 2-D": ((FLAT, FLAT, FLAT), {"key_padding_mask": CAUSAL}),
    "mask 1-D": ((X, X, X), {"attn_mask": CAUSAL[0]}),
    "one mask a head": ((FLAT, FLAT, FLAT), {"attn_mask": CAUSAL.expand(3, 3, 3)}),
}


@pytest.mark.parametrize("name", IN_TORCHS_WORDS)
def test_errors_about_dimensions_say_what_torchs_say(name):
    arguments, keywords = IN_TORCHS_WORDS[name]
    messages = []
    for kind in (nacre.MultiheadAttention, torch.nn.MultiheadAttention):
        with pytest.raises(AssertionError) as caught:
            kind(4, 2)(*arguments, **keywords)
        messages.append(str(caught.value))
    ours, torchs = messages
    assert torchs.split(" but got ")[0] in ours
