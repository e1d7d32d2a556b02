"""The op ``attention``, and scaled_dot_product_attention."""

from typing import Any

import torch
from torch import Tensor

from nacre.core.choice import cpp_kernel, sizes_decide, torch_instead, torch_is_ahead, unserved
from nacre.core.flop_counter import count_flops
from nacre.core.op import Op
from nacre.core.random import new_seed
from nacre.layers.attention import packed
from nacre.layers.attention.checks import check_attention


def _same_batch(query: Tensor, key: Tensor | None, value: Tensor | None, *settings: Any) -> bool:
    if key is None or value is None:
        return True
    if key.shape[:-2] != value.shape[:-2]:
        return False
    enable_gqa = settings[6]
    return query.shape[:-3] == key.shape[:-3] if enable_gqa else query.shape[:-2] == key.shape[:-2]


_op = Op(
    "attention(Tensor query, Tensor? key, Tensor? value, Tensor? mask, Tensor? key_mask, Tensor? seed, float dropout_p,"
    " bool is_causal, float scale, bool enable_gqa, bool need_weights, bool average_weights, int packed_heads)"
    " -> (Tensor output, Tensor weights, Tensor row_maximum, Tensor row_sum)",
    forward=packed.forward,
    backward=packed.backward,
    saved=(
        *("query", "key", "value", "mask", "key_mask", "seed", "dropout_p", "is_causal", "scale", "enable_gqa"),
        *("need_weights", "average_weights", "packed_heads", "row_maximum", "row_sum"),
    ),
    gradients=("query", "key", "value", "mask", "key_mask"),
    outputs=2,
    autocast={"cpu": "lower", "cuda": "lower", "xpu": "lower", "mps": "lower"},
    kernels=[
        cpp_kernel(
            {
                "queries, keys and values of the same leading dimensions, but for grouped heads": _same_batch,
                "at least one query, key and feature": lambda query, key, value, *_: all(
                    item is None or item.numel() > 0 for item in (query, key, value)
                ),
                "masks of bool, float32 or the query's dtype": lambda query, key, value, mask, key_mask, *_: all(
                    item is None or item.dtype in (torch.bool, torch.float32, query.dtype) for item in (mask, key_mask)
                ),
            }
        )
    ],
)
count_flops(_op)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    r"""For each query, a mean of the values, weighted by how well their keys agree with it.

    .. math:: \mathrm{softmax}(Q K^\top \cdot \mathrm{scale} + M)\, V

    Args:
        query: what is looked for, (\*, L, E).
        key: what the queries are compared with, (\*, S, E).
        value: what is averaged, (\*, S, E_v).
        attn_mask: what broadcasts to the scores (\*, L, S): bool, True where a key takes part, or numbers which are
            added to the scores, in float32 or the query's dtype; they may ask for their gradient. Default: none.
        dropout_p: the probability with which a weight is dropped, the others grow by 1 / (1 - dropout_p); also in
            evaluation, so pass 0.0 there. Default: 0.0.
        is_causal: query i sees the keys up to i, also where L is not S. Default: False.
        scale: factor of the scores. Default: 1 / sqrt(E).
        enable_gqa: keys and values may have fewer heads (dimension -3) than queries: consecutive query heads share
            one. Default: False.

    Shape:
        - query: (\*, L, E), key: (\*, S, E), value: (\*, S, E_v), whose leading dimensions broadcast
        - output: (\*, L, E_v); its dimensions lie in memory as those of a query (N, H, L, E)

    Numerics:
        float16 and bfloat16 are computed in float32 and rounded once. The largest score of a row is subtracted before
        the exponential. A query whose every key is masked gets 0. The weights are never kept for the backward, which
        computes them again from two numbers a query, and the mask of the dropout again from one seed. Only
        the gradient of a mask, where it is asked for, takes a matrix of the scores' size for the time of the backward.
        Keys and values that are NaN or infinite may or may not show in the results of queries which they are hidden
        from, as blocks that nobody sees are skipped.

    Raises:
        RuntimeError: shapes, dtypes or devices do not match; dropout_p is not a probability; is_causal with an
            attn_mask, but for queries (N, H, L, E) on a CPU without dropout, where both apply, as in torch.
        IndexError: enable_gqa without a dimension of heads.

    Cost:
        2 L S (E + E_v) FLOPs a head, also where it is causal, and 2 L S (3 E + 2 E_v) backward; the inputs and 2 L
        numbers a head kept for the backward.

    Paper:
        Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762; Dao et al., "FlashAttention", 2022,
        arXiv:2205.14135, for the backward; Ainslie et al., "GQA", 2023, arXiv:2305.13245.

    Example:
        >>> import torch, nacre
        >>> query, key = torch.tensor([[0.0]]), torch.tensor([[1.0], [2.0]])
        >>> nacre.functional.scaled_dot_product_attention(query, key, torch.tensor([[3.0], [5.0]]))
        tensor([[4.]])
    """
    if attn_mask is None and dropout_p == 0 and not enable_gqa:
        if sizes_decide(query) and _few(query, key, value) and torch_is_ahead("attention", _UNDER):
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scale)
    numbers = attn_mask if attn_mask is not None and attn_mask.is_floating_point() else None
    reason = unserved(query, key, value, numbers)
    if attn_mask is not None and _is_causal_bias(attn_mask):
        reason = "a mask of type CausalBias"
    if reason:
        return torch_instead(
            "attention",
            reason,
            torch.nn.functional.scaled_dot_product_attention,
            *(query, key, value, attn_mask, dropout_p, is_causal),
            scale=scale,
            enable_gqa=enable_gqa,
        )
    check_attention(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    return attend(query, key, value, attn_mask, None, dropout_p, is_causal, scale, enable_gqa, False)[0]


_FEW, _VERY_FEW, _MANY_KEYS, _MULTIPLY_ADDS = 33, 9, 1 << 19, 1 << 21
_UNDER = (
    f"{_FEW} queries or {_MULTIPLY_ADDS:,} multiply-adds and no backward, but for under {_VERY_FEW} of {_MANY_KEYS:,}"
    " values of keys,"
)


def _few(query: Any, key: Any, value: Any) -> bool:
    """Whether there are few queries, of keys and values that fit plainly, and no backward will follow."""
    for tensor in (query, key, value):
        if not isinstance(tensor, Tensor):
            return False
    try:  # each shape once, since to ask for one takes as long as all that follows
        (batch, heads, queries, features), shape = query.shape, key.shape
        keys_batch, keys_heads, keys, keys_features = shape
    except (ValueError, RuntimeError):  # other dimensions; a nested tensor
        return False
    values = batch * heads * features
    if queries >= _FEW and values * queries * keys >= _MULTIPLY_ADDS:
        return False
    if queries < _VERY_FEW and values * keys >= _MANY_KEYS:
        return False
    if batch != keys_batch or heads != keys_heads or features != keys_features or shape != value.shape:
        return False
    if not (query.dtype is key.dtype is value.dtype and query.device == key.device == value.device):
        return False
    return not torch.is_grad_enabled() or not (query.requires_grad or key.requires_grad or value.requires_grad)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    key_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None = None,
    enable_gqa: bool = False,
    need_weights: bool = True,
    average_weights: bool = False,
) -> tuple[Tensor, Tensor]:
    """Output and weights of the op on arguments that are known to be good; the weights are empty unless needed."""
    seed = new_seed(query.device) if dropout_p > 0 else None
    if scale is None:
        scale = max(query.shape[-1], 1) ** -0.5  # of no features every score is 0, whatever their scale
    settings = (dropout_p, is_causal, scale, enable_gqa, need_weights, need_weights and average_weights)
    return _op(query, key, value, mask, key_mask, seed, *settings, 0)


def attend_to_itself(
    packed: Tensor,
    num_heads: int,
    mask: Tensor | None,
    key_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    need_weights: bool,
    average_weights: bool,
) -> tuple[Tensor, Tensor]:
    """The same of queries, keys and values packed into one tensor (L, N, 3 H E); the output is (L, N, H E)."""
    seed = new_seed(packed.device) if dropout_p > 0 else None
    scale = (packed.shape[-1] // (3 * num_heads)) ** -0.5
    settings = (dropout_p, is_causal, scale, False, need_weights, need_weights and average_weights)
    return _op(packed, None, None, mask, key_mask, seed, *settings, num_heads)


def _is_causal_bias(mask: Tensor) -> bool:
    """Whether a mask is torch's own stand-in for a causal mask, which holds no values."""
    if not torch.compiler.is_compiling():
        return type(mask).__name__ == "CausalBias"  # to import the class takes a second
    from torch.nn.attention.bias import CausalBias  # the compiler follows types better than their names

    return isinstance(mask, CausalBias)
