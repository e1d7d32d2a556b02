"""What attention asks of its arguments, with the exception types of torch."""

import functools

import torch
from torch import Tensor

from nacre.core import check


def check_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> None:
    """The arguments of scaled_dot_product_attention."""
    check_operands(query, key, value)
    batch = _scores_batch(query, key, value, enable_gqa)
    if mask is not None:
        _check_mask(query, mask, (*batch, query.shape[-2], key.shape[-2]))
        # on a CPU torch's fused kernel applies both; elsewhere torch raises
        if is_causal and (dropout_p > 0 or query.dim() != 4 or query.device.type != "cpu"):
            raise check.error(
                RuntimeError,
                "attention is causal or has an attn_mask, not both",
                f"is_causal=True and attn_mask of shape {check.shape(mask)}",
                "Did you mean attn_mask.tril()?" if mask.dtype is torch.bool else "",
            )
    check_dropout(RuntimeError, dropout_p)


def check_dropout(kind: type[Exception], dropout_p: float) -> None:
    """Raises an exception of that kind unless dropout_p is a probability."""
    if not 0 <= dropout_p <= 1:
        raise check.error(kind, "dropout probability has to be between 0 and 1", f"dropout_p = {dropout_p}")


def check_operands(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Query, key and value (*, rows, features) which fit together, but for their leading dimensions."""
    if min(query.dim(), key.dim(), value.dim()) < 2:
        rule = "attention takes a query (*, L, E), a key (*, S, E) and a value (*, S, E_v)"
        raise check.error(RuntimeError, rule, shapes(query=query, key=key, value=value))
    if query.shape[-1] != key.shape[-1]:
        rule = "attention compares query and key over their last dimension, which has one size"
        raise check.error(RuntimeError, rule, shapes(query=query, key=key))
    if key.shape[-2] != value.shape[-2]:
        rule = "attention has a value for each key: their dimensions -2 have one size"
        raise check.error(RuntimeError, rule, shapes(key=key, value=value))
    check.same_dtype("attention", query=query, key=key, value=value)
    check.same_device("attention", query=query, key=key, value=value)


def _scores_batch(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[int, ...]:
    """The leading dimensions of the scores."""
    batches = [tuple(tensor.shape[:-2]) for tensor in (query, key, value)]
    if enable_gqa:
        if not all(batches):
            rule = "grouped-query attention has its heads in dimension -3"
            raise check.error(IndexError, rule, shapes(query=query, key=key, value=value))
        heads, key_heads, value_heads = (batch[-1] for batch in batches)
        if any(count != heads and (count == 0 or heads % count) for count in (key_heads, value_heads)):
            raise check.error(
                RuntimeError,
                "the number of heads in key and value must divide the number of heads in query",
                f"{heads} heads in query, {key_heads} in key and {value_heads} in value",
            )
        batches = [(*batch[:-1], heads) for batch in batches]
    if batches[0] == batches[1] == batches[2]:  # to find it out otherwise takes as long as a small attention
        return batches[0]
    try:
        torch.broadcast_shapes(*batches)
    except RuntimeError:
        fix = "Did you mean enable_gqa=True?" if _may_group(query, key, enable_gqa) else ""
        rule = "the leading dimensions of query, key and value broadcast"
        raise check.error(RuntimeError, rule, shapes(query=query, key=key, value=value), fix) from None
    return tuple(torch.broadcast_shapes(*batches[:2]))


def _may_group(query: Tensor, key: Tensor, enable_gqa: bool) -> bool:
    if enable_gqa or min(query.dim(), key.dim()) < 3:
        return False
    return key.shape[-3] > 0 and query.shape[-3] % key.shape[-3] == 0


def _check_mask(query: Tensor, mask: Tensor, scores: tuple[int, ...]) -> None:
    check.same_device("attention", query=query, attn_mask=mask)
    check_mask_dtype(query, mask)
    last = scores[len(scores) - mask.dim() :]
    # compared one by one: the compiler's `in` does not compare a size that it holds as a symbol
    if mask.dim() > len(scores) or any(
        size != 1 and size != wanted for size, wanted in zip(mask.shape, last, strict=True)
    ):
        raise check.error(
            RuntimeError,
            f"an attn_mask broadcasts to the scores of every query with every key, here {scores}",
            f"attn_mask of shape {check.shape(mask)}",
        )


def check_mask_dtype(query: Tensor, *masks: Tensor | None, only: bool = False) -> None:
    """Raises RuntimeError unless torch adds the sum of the masks to the scores.

    Args:
        query: the query, whose dtype a mask may have.
        masks: masks, or None.
        only: whether torch takes masks of the query's dtype only, not also float32.
    """
    given = [query.dtype if mask.dtype is torch.bool else mask.dtype for mask in masks if mask is not None]
    if not given or check.under_autocast(query):
        return
    if functools.reduce(torch.promote_types, given) not in (query.dtype, query.dtype if only else torch.float32):
        raise check.error(
            RuntimeError,
            f"an attention mask is of dtype bool{'' if only else ', float32'} or that of the query",
            f"a mask of dtype {' and one of dtype '.join(map(str, given))}, and a query of dtype {query.dtype}",
            f"Did you mean a mask of dtype {query.dtype}, or bool?",
        )


def shapes(**tensors: Tensor) -> str:
    """Names and shapes, for messages."""
    return ", ".join(f"{name} {check.shape(tensor)}" for name, tensor in tensors.items())
