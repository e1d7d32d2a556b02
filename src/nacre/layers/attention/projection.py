"""From the inputs of MultiheadAttention to the queries, keys and values of its heads."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from nacre.core.op import call
from nacre.layers.attention.layout import split_heads
from nacre.layers.attention.multi_head_checks import check_own_keys

Three = tuple[Tensor, Tensor, Tensor]


def project(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A projection of rows (L, N, E), which lie in memory as their projections will."""
    if rows.stride(0) < rows.stride(1):
        return call("linear", rows.transpose(0, 1), weight, bias).transpose(0, 1)
    return call("linear", rows, weight, bias)


def project_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    weight: Tensor | Three,
    bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    static_k: Tensor | None,
    static_v: Tensor | None,
    add_zero_attn: bool,
) -> Three:
    """Queries (N, H, L, E), keys and values (N, H, S, E), with the layer's own keys after those of the input.

    Args:
        query: (L, N, H E).
        key: (S, N, E_k), not projected where there are static keys.
        value: (S, N, E_v), not projected where there are static values.
        num_heads: H.
        weight: of all three one above the other, (3 H E, H E), or of each.
        bias: of all three, one after the other.
        bias_k: a key that follows the input's.
        bias_v: a value that follows the input's.
        static_k: projected keys (N H, S, E).
        static_v: projected values (N H, S, E).
        add_zero_attn: end the keys and values with a row of zeros.
    """
    batch, width = query.shape[1:]
    check_own_keys(bias_k, bias_v, static_k, static_v, batch * num_heads, width // num_heads)
    if isinstance(weight, Tensor) and bias_k is static_k is static_v is None and not add_zero_attn:
        q, k, v = _project_together(query, key, value, weight, bias)
        return split_heads(q, num_heads), split_heads(k, num_heads), split_heads(v, num_heads)
    q_bias, k_bias, v_bias = (None, None, None) if bias is None else bias.split(width)
    q_weight, k_weight, v_weight = weight.split(width) if isinstance(weight, Tensor) else weight
    q = split_heads(project(query, q_weight, q_bias), num_heads)
    k = _own_and_projected(key, k_weight, k_bias, bias_k, static_k, num_heads)
    v = _own_and_projected(value, v_weight, v_bias, bias_v, static_v, num_heads)
    return (q, pad(k, (0, 0, 0, 1)), pad(v, (0, 0, 0, 1))) if add_zero_attn else (q, k, v)


def _project_together(query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None) -> Three:
    """One product for keys and values which are projected from the same tensor; they are views of its result."""
    width = query.shape[-1]
    together = key is value
    inputs, sizes = ((query, key), [width, 2 * width]) if together else ((query, key, value), [width] * 3)
    weights = torch.split_with_sizes(weight, sizes)
    biases = [None] * len(sizes) if bias is None else torch.split_with_sizes(bias, sizes)
    q, *others = [project(rows, w, b) for rows, w, b in zip(inputs, weights, biases, strict=True)]
    k, v = others[0].chunk(2, -1) if together else others
    return q, k, v


def _own_and_projected(
    input: Tensor, weight: Tensor, bias: Tensor | None, own: Tensor | None, static: Tensor | None, num_heads: int
) -> Tensor:
    """Keys, or values: what is static, or projected from the input with what the layer has of its own after it."""
    if static is not None:
        return static.unflatten(0, (static.shape[0] // num_heads, num_heads))
    projected = project(input, weight, bias)
    if own is not None:
        projected = torch.cat([projected, own.expand(1, projected.shape[1], -1)])
    return split_heads(projected, num_heads)
