"""The masks of MultiheadAttention as the op ``attention`` takes them.

torch.nn's bool masks are True where a key is ignored, the op's where it takes part. Masks of numbers, which are added
to the scores, are the same to both.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from nacre.core import check
from nacre.core.dispatch import recordable
from nacre.layers.attention.checks import check_mask_dtype
from nacre.layers.attention.multi_head_checks import check_attention_mask, check_padding_mask


def masks_of_scores(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    query: Tensor,
    scores: tuple[int, int, int, int],
    own_keys: int,
    need_weights: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """What broadcasts to the scores.

    Args:
        attn_mask: (L, S - own_keys) or (N H, L, S - own_keys).
        key_padding_mask: (N, S - own_keys).
        query: projected, for its dtype and device.
        scores: their sizes, N, H, L and S.
        own_keys: how many of the keys are the layer's own, at the end; no mask hides them.
        need_weights: whether the weights are returned, which torch computes in the query's dtype alone.
    """
    batch, heads, queries, keys = scores
    keys -= own_keys
    check.same_device("attention", query=query, attn_mask=attn_mask, key_padding_mask=key_padding_mask)
    check_mask_dtype(query, attn_mask, key_padding_mask, only=need_weights)
    mask = key_mask = None
    if attn_mask is not None:
        check_attention_mask(attn_mask, batch, heads, queries, keys)
        mask = _seen(attn_mask, own_keys)
        mask = mask if mask.dim() == 2 else mask.unflatten(0, (batch, heads))
    if key_padding_mask is not None:
        check_padding_mask(key_padding_mask, batch, keys)
        key_mask = _seen(key_padding_mask, own_keys)[:, None, None]
    return mask, key_mask


def _seen(mask: Tensor, own_keys: int) -> Tensor:
    seen = ~mask if mask.dtype is torch.bool else recordable(mask)
    return pad(seen, (0, own_keys), value=mask.dtype is torch.bool) if own_keys else seen
