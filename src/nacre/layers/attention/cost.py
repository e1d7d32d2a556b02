"""What MultiheadAttention costs: four projections, and two products of queries with keys and weights with values."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nacre.core.cost import Cost
from nacre.core.spec import Letters

COMPLEXITY = "time O(N L E (L + E)), saved O(N L E)"


def sizes(
    layer: torch.nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> dict[str, Any]:
    """N times L queries and S keys, from a call of the layer."""
    batched = query.dim() == 3
    length, batch = (1, 0) if layer.batch_first else (0, 1)
    hinted = is_causal and key_padding_mask is None and not need_weights
    masks = [mask for mask in (None if hinted else attn_mask, key_padding_mask) if mask is not None]
    own_keys = (layer.bias_k is not None) + layer.add_zero_attn
    weight = layer.in_proj_weight if layer._qkv_same_embed_dim else layer.q_proj_weight
    return {
        "batch": query.shape[batch] if batched else 1,
        "queries": query.shape[length] if batched else query.shape[0],
        "keys": key.shape[length] if batched else key.shape[0],
        "embed_dim": layer.embed_dim,
        "num_heads": layer.num_heads,
        "kdim": layer.kdim,
        "vdim": layer.vdim,
        "bias": layer.in_proj_bias is not None,
        "bias_kv": layer.bias_k is not None,
        "zero_attn": layer.add_zero_attn,
        "other_key": key is not query,
        "other_value": value is not query and value is not key,
        "need_weights": need_weights,
        "average": average_attn_weights,
        "dropout": layer.training and layer.dropout > 0,
        "causal": hinted,
        "masks": len(masks),
        "mask_bytes": sum(_rows(mask) * (mask.shape[-1] + own_keys) * mask.element_size() for mask in masks),
        "itemsize": query.element_size(),
        "statistics_itemsize": max(4, query.element_size()),
        "query_gradient": query.requires_grad,
        "key_gradient": key.requires_grad,
        "value_gradient": value.requires_grad,
        "in_gradient": weight.requires_grad,
        "out_gradient": layer.out_proj.weight.requires_grad,
        "attn_mask_gradient": not hinted and attn_mask is not None and attn_mask.requires_grad,
        "padding_mask_gradient": key_padding_mask is not None and key_padding_mask.requires_grad,
    }


def _names(sizes: Mapping[str, Any]) -> dict[str, str]:
    width = sizes["embed_dim"]
    names = {
        "batch": "N",
        "queries": "L",
        "keys": "S" if sizes["other_key"] else "L",
        "embed_dim": "E",
        "kdim": "E" if sizes["kdim"] == width else "K",
        "vdim": "E" if sizes["vdim"] == width else "V",
        "num_heads": "H",
    }
    return names | {"mask_bytes": "M"} if sizes["mask_bytes"] else names


def _inputs(layer: torch.nn.MultiheadAttention, size: int) -> tuple[Tensor, Tensor, Tensor]:
    def tokens(features: int) -> Tensor:
        shape = (size, size + 1) if layer.batch_first else (size + 1, size)
        return layer.out_proj.weight.new_empty(*shape, features, device="meta", requires_grad=True)

    query = tokens(layer.embed_dim)
    if layer._qkv_same_embed_dim:
        return query, query, query
    return query, tokens(layer.kdim), tokens(layer.vdim)


LETTERS = Letters(_names, _inputs, at_most={"H": ("E",), "M": ("N H L S", "N H L^2")})


def _rows(mask: Tensor) -> int:
    rows = 1
    for size in mask.shape[:-1]:
        rows *= size
    return rows


def cost(
    batch: int,
    queries: int,
    keys: int,
    embed_dim: int,
    num_heads: int,
    kdim: int | None = None,
    vdim: int | None = None,
    bias: bool = True,
    bias_kv: bool = False,
    zero_attn: bool = False,
    other_key: bool = False,
    other_value: bool = False,
    need_weights: bool = True,
    average: bool = True,
    dropout: bool = False,
    causal: bool = False,
    masks: int = 0,
    mask_bytes: int = 0,
    itemsize: int = 4,
    statistics_itemsize: int = 4,
    query_gradient: bool = True,
    key_gradient: bool = True,
    value_gradient: bool = True,
    in_gradient: bool = True,
    out_gradient: bool = True,
    attn_mask_gradient: bool = False,
    padding_mask_gradient: bool = False,
) -> Cost:
    """The exact bill: N batch elements, L queries, S keys of the input and T with the layer's own, H heads of E / H.

    Forward, FLOPs: each of the N L E values of Q and of the output sums E products, each of the N S E of K (of V) kdim
    (vdim); each of the N H L T scores sums E / H products, and each of the N L E values of the heads T. A causal mask
    saves none of it: the whole L x T counts, as in papers.
    Forward, an element: the bias (1 for each value of Q, K, V and the output, with bias), the scale (1 for each value
    of Q); each of the N H L T scores: one for each mask, its part in the row's maximum, subtract, exponential, sum,
    divide (5), the dropout (1), its part in the mean over heads (1, with averaged weights).
    Backward, FLOPs: a projection has one product for its weight and one for its input, each as large as forward;
    attention computes the scores again, and has one product each for dV, dW, dQ and dK: five in all, of 2 N L T E each.
    Backward, an element: the bias's sum and the scale as forward, the scale of dQ and dK; each score: the masks,
    subtract, exponential and divide (3), the dropout of P and of dW, its part in r (2), subtract r and multiply by P
    (2), the sum of each mask's gradient; with weights, the gradient of their mean and its addition to dW.
    Traffic backward: the inputs for the weights of their projections; Q, K and what stands for P; V for dA; the heads'
    outputs for the weight of the last projection; the gradients of output and weights; each projection's weight for the
    gradient of its input. Written: the gradients.
    Kept: the inputs; Q, K, V and the heads' outputs, which are the input of the last projection; a maximum and a sum a
    row; the masks as the op takes them; the seed of the dropout.
    """
    kdim = embed_dim if kdim is None else kdim
    vdim = embed_dim if vdim is None else vdim
    all_keys = keys + bias_kv + zero_attn
    q, k, v = batch * queries * embed_dim, batch * keys * embed_dim, batch * keys * embed_dim
    kv, heads = batch * all_keys * embed_dim, batch * queries * embed_dim
    rows = batch * num_heads * queries
    scores = rows * all_keys
    returned = need_weights * (scores * (1 - average) + batch * queries * all_keys * average)
    other_keys, other_values = other_key * batch * keys * kdim, other_value * batch * keys * vdim
    weights_in, weights_out = embed_dim * (embed_dim + kdim + vdim), embed_dim * embed_dim
    own_in, own_out = weights_in + embed_dim * (3 * bias + 2 * bias_kv), weights_out + embed_dim * bias

    project_q, project_k, project_v, project_out = q * embed_dim, k * kdim, v * vdim, heads * embed_dim
    product = batch * queries * all_keys * embed_dim
    masked = masks + causal

    # what the backward has to find: the gradients of Q, K, V and the scores, and whether any of them
    dq, dk, dv = (_either(wanted, in_gradient) for wanted in (query_gradient, key_gradient, value_gradient))
    ds = _either(_either(dq, dk), _either(attn_mask_gradient, padding_mask_gradient))
    attends = _either(ds, dv)
    asked = query_gradient * q + key_gradient * other_keys + value_gradient * other_values
    kept = (
        dq * q + dk * other_keys + dv * other_values + attends * (q + 2 * kv) + _either(attends, out_gradient) * heads
    )
    beside = attends * (2 * rows * statistics_itemsize + mask_bytes + 8 * dropout)
    needed = (
        in_gradient * (q + other_keys + other_values)
        + (attends * (q + kv) + ds * kv)
        + (out_gradient + _either(attends, out_gradient)) * heads
        + ds * returned
        + embed_dim * (query_gradient * embed_dim + key_gradient * kdim + value_gradient * vdim)
        + attends * weights_out
    )
    return Cost(
        parameters=own_in + own_out,
        flops=2 * (project_q + project_k + project_v + project_out + 2 * product),
        backward_flops=2
        * (
            project_q * (in_gradient + query_gradient)
            + project_k * (in_gradient + key_gradient)
            + project_v * (in_gradient + value_gradient)
            + project_out * (out_gradient + attends)
            + product * (attends + dq + dk + dv + ds)
        ),
        elementwise_flops=bias * (q + k + v + heads) + q + scores * (masked + 5 + dropout + need_weights * average),
        backward_elementwise_flops=bias * (in_gradient * (q + k + v) + out_gradient * heads)
        + attends * (q + scores * (masked + 3 + dropout))
        + ds * scores * (dropout + 4 + need_weights * (1 + average))
        + dq * q
        + dk * kv
        + scores * (attn_mask_gradient + padding_mask_gradient),
        bytes=itemsize * (q + other_keys + other_values + own_in + own_out + heads + returned) + mask_bytes,
        backward_bytes=beside + itemsize * (needed + asked + own_in * in_gradient + own_out * out_gradient),
        saved_bytes=beside + itemsize * kept,
    )


def _either(one: int, other: int) -> int:
    return 1 - (1 - one) * (1 - other)
