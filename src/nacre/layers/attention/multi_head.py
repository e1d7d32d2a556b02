"""multi_head_attention_forward: projections in, attention of several heads, a projection out."""

import torch
from torch import Tensor

from nacre.core import check
from nacre.core.choice import torch_instead, unserved
from nacre.core.op import call
from nacre.layers.attention.checks import check_dropout, check_operands
from nacre.layers.attention.layout import each_once, merge_heads
from nacre.layers.attention.masks import masks_of_scores
from nacre.layers.attention.multi_head_checks import (
    check_dimensions,
    check_hint,
    check_out_projection,
    check_widths,
    in_projection,
)
from nacre.layers.attention.projection import project, project_heads
from nacre.layers.attention.scaled_dot_product import attend, attend_to_itself


def multi_head_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    r"""Attention of several heads between projections in and out; see :class:`nacre.MultiheadAttention`.

    Args:
        query: (L, N, E), or (L, E) where nothing is batched.
        key: (S, N, E_k) or (S, E_k).
        value: (S, N, E_v) or (S, E_v).
        embed_dim_to_check: E.
        num_heads: heads, H, which share the E features in equal parts.
        in_proj_weight: weights of query, key and value, one above the other, (3 E, E).
        in_proj_bias: their biases, (3 E).
        bias_k: a key beside those of the input, (E) or (1, 1, E); seen by every query.
        bias_v: its value.
        add_zero_attn: a key and a value of zeros beside those of the input, seen by every query.
        dropout_p: the probability with which a weight is dropped in training.
        out_proj_weight: (E_out, E).
        out_proj_bias: (E_out).
        training: apply dropout. Default: True.
        key_padding_mask: (N, S) or (S): bool, True where a key is ignored, or numbers which are added to its scores.
            Default: none.
        need_weights: return the weights too. Default: True.
        attn_mask: (L, S) or (N H, L, S): bool, True where a query ignores a key, or numbers which are added to the
            scores. Default: none.
        use_separate_proj_weight: project with the following three instead of ``in_proj_weight``. Default: False.
        q_proj_weight: (E, E).
        k_proj_weight: (E, E_k).
        v_proj_weight: (E, E_v).
        static_k: keys that are projected and split into heads already, (N H, S, E / H), in place of ``key``'s.
        static_v: the same for the values.
        average_attn_weights: the returned weights are the mean over the heads. Default: True.
        is_causal: a hint that ``attn_mask`` is the causal mask, which then need not be read. Default: False.

    Raises:
        AssertionError: sizes, masks or weights do not fit together.
        RuntimeError: the shapes of batches, weights or ``attn_mask``, dtypes or devices do not match; is_causal without
            attn_mask; dropout_p is not a probability (a ValueError with need_weights).

    Example:
        >>> import torch, nacre
        >>> tokens, identity = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.eye(2)
        >>> output, weights = nacre.functional.multi_head_attention_forward(
        ...     tokens, tokens, tokens, 2, 1, identity.repeat(3, 1), None, None, None, False, 0.0, identity, None
        ... )
        >>> weights
        tensor([[0.6698, 0.3302],
                [0.3302, 0.6698]])
    """
    separate = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else None
    parameters = (in_proj_weight, in_proj_bias, bias_k, bias_v, out_proj_weight, out_proj_bias, *(separate or ()))
    numbers = (mask for mask in (attn_mask, key_padding_mask) if mask is not None and mask.is_floating_point())
    reason = unserved(query, key, value, *parameters, static_k, static_v, *numbers)
    if reason := reason or _unlike(out_proj_weight, in_proj_bias, bias_k, bias_v, out_proj_bias):
        return torch_instead(
            "attention",
            reason,
            torch.nn.functional.multi_head_attention_forward,
            *(query, key, value, embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias, bias_k, bias_v),
            *(add_zero_attn, dropout_p, out_proj_weight, out_proj_bias, training, key_padding_mask, need_weights),
            *(attn_mask, use_separate_proj_weight, q_proj_weight, k_proj_weight, v_proj_weight, static_k, static_v),
            *(average_attn_weights, is_causal),
        )
    batched = query.dim() == 3
    dropout_p = dropout_p if training else 0.0
    check_dimensions(query, key, value, num_heads, key_padding_mask, attn_mask)
    check_hint(is_causal, attn_mask)
    check_dropout(ValueError if need_weights else RuntimeError, dropout_p)
    if not batched:
        query, key, value = each_once(lambda rows: rows.unsqueeze(1), query, key, value)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    check_widths(query, key, value, embed_dim_to_check, num_heads, use_separate_proj_weight)
    weight = in_projection(query, key, value, in_proj_weight, separate, in_proj_bias)
    check_out_projection(query.shape[-1], out_proj_weight)
    projections = {"in_proj_weight": in_proj_weight} if separate is None else {"q_proj_weight": q_proj_weight}
    check.same_dtype("MultiheadAttention", query=query, key=key, value=value, **projections, weight=out_proj_weight)
    check.same_device("MultiheadAttention", query=query, key=key, value=value, weight=out_proj_weight)

    length, batch = query.shape[:2]
    # the hint serves where the causal mask is all there is to know
    is_causal = is_causal and key_padding_mask is None and not need_weights
    masks = (None if is_causal else attn_mask, key_padding_mask)
    alone = bias_k is bias_v is static_k is static_v is None and not add_zero_attn
    if query is key is value and isinstance(weight, Tensor) and alone:
        packed = project(query, weight, in_proj_bias)
        seen = masks_of_scores(*masks, packed, (batch, num_heads, length, length), 0, need_weights)
        output, weights = attend_to_itself(
            packed, num_heads, *seen, dropout_p, is_causal, need_weights, average_attn_weights
        )
    else:
        q, k, v = project_heads(
            query, key, value, num_heads, weight, in_proj_bias, bias_k, bias_v, static_k, static_v, add_zero_attn
        )
        check_operands(q, k, v)
        own_keys = (bias_k is not None) + add_zero_attn
        seen = masks_of_scores(*masks, q, (batch, num_heads, length, k.shape[-2]), own_keys, need_weights)
        output, weights = attend(
            q, k, v, *seen, dropout_p, is_causal, need_weights=need_weights, average_weights=average_attn_weights
        )
        output = merge_heads(output)
    output = call("linear", output, out_proj_weight, out_proj_bias)
    output = output if batched else output.squeeze(1)
    if not need_weights:
        return output, None
    # in autocast torch's softmax returns float32 on every device but a CPU
    if query.device.type != "cpu" and check.under_autocast(query):
        weights = weights.float()
    return output, weights if batched else weights.squeeze(0)


def _unlike(weight: Tensor, *biases: Tensor | None) -> str:
    """Why biases of another dtype are left to torch, which adds them in some arrangements; empty where all agree."""
    if all(bias is None or bias.dtype == weight.dtype for bias in biases) or check.under_autocast(weight):
        return ""
    return "a bias of another dtype than the weight"
