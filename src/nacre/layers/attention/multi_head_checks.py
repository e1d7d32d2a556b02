"""What multi_head_attention_forward asks of its arguments, with the exception types of torch."""

import torch
from torch import Tensor

from nacre.core import check
from nacre.layers.attention.checks import shapes


def check_dimensions(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
) -> None:
    """Query, key, value and masks are batched together, or not; masks are bool or floating-point."""
    if query.dim() not in (2, 3):
        raise check.error(
            AssertionError,
            f"query should be unbatched 2D or batched 3D tensor but received {query.dim()}-D query tensor",
            f"a query of shape {check.shape(query)}",
        )
    kind = "batched (3-D)" if query.dim() == 3 else "unbatched (2-D)"
    if key.dim() != query.dim() or value.dim() != query.dim():
        raise check.error(
            AssertionError,
            f"For {kind} `query`, expected `key` and `value` to be {query.dim()}-D but found {key.dim()}-D and"
            f" {value.dim()}-D tensors respectively",
            shapes(query=query, key=key, value=value),
        )
    _check_mask("key_padding_mask", key_padding_mask, kind, (query.dim() - 1,))
    _check_mask("attn_mask", attn_mask, kind, (2, 3))
    if query.dim() == 2 and attn_mask is not None and attn_mask.dim() == 3:
        expected = (num_heads, query.shape[0], key.shape[0])
        if tuple(attn_mask.shape) != expected:
            raise check.error(
                AssertionError,
                f"Expected `attn_mask` shape to be {expected}, one mask a head",
                f"attn_mask of shape {check.shape(attn_mask)}",
            )


def _check_mask(name: str, mask: Tensor | None, kind: str, dimensions: tuple[int, ...]) -> None:
    if mask is None:
        return
    if mask.dim() not in dimensions:
        allowed = f"`None` or {dimensions[0]}-D" if len(dimensions) == 1 else "`None`, 2-D or 3-D"
        raise check.error(
            AssertionError,
            f"For {kind} `query`, expected `{name}` to be {allowed} but found {mask.dim()}-D tensor instead",
            f"{name} of shape {check.shape(mask)}",
        )
    if mask.dtype is not torch.bool and not mask.is_floating_point():
        raise check.error(
            AssertionError,
            f"only bool and floating types of {name} are supported",
            f"{name} of dtype {mask.dtype}",
            f"Did you mean {name}.bool()?",
        )


def check_hint(is_causal: bool, attn_mask: Tensor | None) -> None:
    """The hint is_causal is about a mask that is there."""
    if is_causal and attn_mask is None:
        raise check.error(
            RuntimeError,
            "is_causal is a hint that attn_mask is the causal mask, and needs attn_mask",
            "is_causal=True without attn_mask",
            "Did you mean attn_mask=torch.nn.Transformer.generate_square_subsequent_mask(length)?",
        )


def check_widths(query: Tensor, key: Tensor, value: Tensor, embed_dim: int, num_heads: int, separate: bool) -> None:
    """Widths that agree with the layer's, and keys that agree with their values; all three are (rows, N, features)."""
    if query.shape[-1] != embed_dim:
        raise check.error(
            AssertionError,
            f"was expecting embedding dimension of {embed_dim}, but got {query.shape[-1]}, the last of the query",
            f"a query {_sizes(query)}",
            f"Did you mean embed_dim = {query.shape[-1]}?",
        )
    check_heads(embed_dim, num_heads)
    if key.shape[:2] != value.shape[:2] if separate else key.shape != value.shape:
        rule = "key and value have one length and batch size" if separate else "key and value have one shape"
        fix = "" if separate else "A value of another width needs vdim."
        raise check.error(AssertionError, rule, f"a key {_sizes(key)}, and a value {_sizes(value)}", fix)
    if key.shape[1] != query.shape[1]:
        raise check.error(
            RuntimeError,
            "query and key have one batch size",
            f"a query {_sizes(query)}, and a key {_sizes(key)}",
            "The batch is dimension 0 with batch_first=True, else dimension 1.",
        )


def _sizes(rows: Tensor) -> str:
    return f"of length {rows.shape[0]}, batch size {rows.shape[1]} and {rows.shape[2]} features"


def check_heads(embed_dim: int, num_heads: int) -> None:
    """The heads share the features in equal parts."""
    if embed_dim % num_heads:
        raise check.error(
            AssertionError,
            "embed_dim must be divisible by num_heads",
            f"embed_dim = {embed_dim} and num_heads = {num_heads}",
            f"Did you mean embed_dim = {embed_dim // num_heads * num_heads + num_heads}?",
        )


def in_projection(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: Tensor | None,
    separate: tuple[Tensor | None, Tensor | None, Tensor | None] | None,
    bias: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """The weight of query, key and value together, or of each where they are separate: known to fit the inputs."""
    width = query.shape[-1]
    if bias is not None:
        _check_shape(RuntimeError if separate is None else AssertionError, "in_proj_bias", bias, (3 * width,))
    if separate is not None:
        q_weight, k_weight, v_weight = separate
        return (
            _own_weight("query", query, q_weight, width),
            _own_weight("key", key, k_weight, width),
            _own_weight("value", value, v_weight, width),
        )
    if packed is None:
        raise check.error(
            AssertionError, "without use_separate_proj_weight, in_proj_weight is needed", "in_proj_weight = None"
        )
    _check_shape(RuntimeError, "in_proj_weight", packed, (3 * width, width))
    if key.shape[-1] != width:
        raise check.error(
            RuntimeError,
            f"in_proj_weight projects keys and values of {width} features, as many as the query has",
            f"a key {_sizes(key)}",
            "Keys and values of another width need kdim and vdim.",
        )
    return packed


def _own_weight(name: str, input: Tensor, weight: Tensor | None, width: int) -> Tensor:
    label = f"{name[0]}_proj_weight"
    if weight is None:
        raise check.error(AssertionError, f"with use_separate_proj_weight, {label} is needed", f"{label} = None")
    if tuple(weight.shape) != (width, input.shape[-1]):
        raise check.error(
            AssertionError,
            f"{label} is of shape (embed_dim, features of the {name}), here {(width, input.shape[-1])}",
            f"{label} of shape {check.shape(weight)}",
        )
    return weight


def check_out_projection(width: int, weight: Tensor) -> None:
    """It takes what all heads together give."""
    if weight.dim() != 2 or weight.shape[1] != width:
        raise check.error(
            RuntimeError,
            f"out_proj_weight takes the {width} features of all heads together",
            f"out_proj_weight of shape {check.shape(weight)}",
        )


def _check_shape(kind: type[Exception], name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise check.error(kind, f"{name} is of shape {shape} here", f"{name} of shape {check.shape(tensor)}")


def check_own_keys(
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    static_k: Tensor | None,
    static_v: Tensor | None,
    heads: int,
    head_dim: int,
) -> None:
    """Biases come in pairs, and never with static keys or values, which are split into heads already."""
    if (bias_k is None) != (bias_v is None):
        got = "bias_k alone" if bias_v is None else "bias_v alone"
        raise check.error(AssertionError, "bias_k and bias_v are given together", got)
    for name, static in (("static_k", static_k), ("static_v", static_v)):
        if static is None:
            continue
        if bias_k is not None:
            raise check.error(AssertionError, f"a bias cannot be added to {name}", f"bias_k and {name}")
        if static.dim() != 3 or static.shape[0] != heads or static.shape[2] != head_dim:
            raise check.error(
                AssertionError,
                f"{name} is of shape (N H, S, E / H), here ({heads}, S, {head_dim})",
                f"{name} of shape {check.shape(static)}",
            )


def check_attention_mask(mask: Tensor, batch: int, heads: int, queries: int, keys: int) -> None:
    """(L, S), or (N H, L, S) with a mask for each head of each batch element."""
    if tuple(mask.shape) not in ((queries, keys), (batch * heads, queries, keys)):
        raise check.error(
            RuntimeError,
            f"attn_mask is of shape (L, S), here ({queries}, {keys}), or (N H, L, S), here"
            f" ({batch * heads}, {queries}, {keys})",
            f"attn_mask of shape {check.shape(mask)}",
            "Did you mean attn_mask.T?" if tuple(mask.shape) == (keys, queries) else "",
        )


def check_padding_mask(mask: Tensor, batch: int, keys: int) -> None:
    """(N, S)."""
    if tuple(mask.shape) != (batch, keys):
        raise check.error(
            AssertionError,
            f"key_padding_mask is of shape (N, S), here ({batch}, {keys})",
            f"key_padding_mask of shape {check.shape(mask)}",
            "Did you mean key_padding_mask.T?" if tuple(mask.shape) == (keys, batch) else "",
        )
