"""The transformer block in the form of torch.nn, which takes its arguments, masks, checkpoints and subclasses."""

from collections.abc import Callable

import torch
from torch import Tensor

from nacre.blocks.fused import feed_forward, residual_dropout, residual_dropout_layer_norm
from nacre.blocks.inference import UNDER, is_small
from nacre.core.choice import sizes_decide, torch_instead, torch_is_ahead
from nacre.core.tracing import Proxy, as_torchs_layer, traced
from nacre.layers import LAYERS


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    r"""The encoder layer of the original transformer, with the arguments and the checkpoint of torch.nn's.

    .. math::
        x &\leftarrow \mathrm{norm}_1(x + \mathrm{attn}(x)) \\
        x &\leftarrow \mathrm{norm}_2(x + \mathrm{linear}_2(\mathrm{activation}(\mathrm{linear}_1(x))))

    With ``norm_first`` each normalisation moves into its part, before attention and linear layers.

    Args:
        d_model: features of a token, D.
        nhead: heads of the attention; they divide ``d_model``.
        dim_feedforward: features between the two linear layers, F. Default: 2048.
        dropout: share of values dropped, from 0 to 1. Default: 0.1.
        activation: ``"relu"``, ``"gelu"`` or a function of one tensor. Default: relu.
        layer_norm_eps: added to the variance in the normalisations. Default: 1e-5.
        batch_first: tokens come as (B, T, D) rather than (T, B, D). Default: False.
        norm_first: normalise before each part. Default: False.
        bias: whether its layers learn biases. Default: True.
        device: where the parameters are made. Default: torch's default device.
        dtype: of the parameters. Default: torch's default dtype.

    Shape:
        - input: (T, B, D), (B, T, D) with ``batch_first``, or (T, D)
        - output: as the input

    Numerics:
        Those of its parts, in training and in evaluation alike: torch's fused evaluation path is not taken, but for
        small calls without a backward or a mask, and for the nested tensors which ``torch.nn.TransformerEncoder`` makes
        of padded batches.

    Raises:
        ValueError: ``d_model`` or ``nhead`` is not positive, or ``dropout`` is outside 0 to 1.
        AssertionError: ``nhead`` does not divide ``d_model``, or a mask is neither bool nor floating point.
        RuntimeError: shapes, dtypes or devices do not match; ``activation`` is an unknown name.

    Cost:
        O(B T D (T + D + F)) time, the sum of its parts and two additions.

    Paper:
        Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762.

    Example:
        >>> import torch, nacre
        >>> layer = nacre.TransformerEncoderLayer(16, nhead=2, batch_first=True)
        >>> layer(torch.ones(2, 5, 16)).shape
        torch.Size([2, 5, 16])
    """

    __prepare_scriptable__ = as_torchs_layer

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = torch.nn.functional.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model,
            nhead,
            dim_feedforward,
            dropout,
            activation,
            layer_norm_eps,
            batch_first,
            norm_first,
            bias,
            device,
            dtype,
        )
        served = {spec.replaces: spec.layer for spec in LAYERS.values()}
        for child in self.children():
            child.__class__ = served.get(type(child), type(child))

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """The encoded tokens.

        Args:
            src: the tokens.
            src_mask: (T, T) or (B heads, T, T), True where a token is not to be gathered from, or numbers which are
                added to the scores. Default: none.
            src_key_padding_mask: (B, T) or (T), True for padding, or numbers. Default: none.
            is_causal: ``src_mask`` is the causal mask. Default: False.
        """
        if type(src) is not Tensor and isinstance(src, Proxy):
            return traced(self, src, src_mask, src_key_padding_mask, is_causal)
        if src.is_nested:
            return torch_instead(
                "transformer_encoder_layer",
                "a nested tensor",
                super().forward,
                src,
                src_mask,
                src_key_padding_mask,
                is_causal,
            )
        changed = _changed(self)
        if src_mask is None and src_key_padding_mask is None and not (is_causal or changed):
            if is_small(self, src) and sizes_decide(src) and torch_is_ahead("transformer_encoder_layer", UNDER):
                return super().forward(src)
        canonical = torch.nn.functional._canonical_mask
        of_mask = torch.nn.functional._none_or_dtype(src_mask)
        padding = canonical(src_key_padding_mask, "src_key_padding_mask", of_mask, "src_mask", src.dtype)
        mask = canonical(src_mask, "src_mask", None, "", src.dtype, False)
        if changed:
            return self._with_own_parts(src, mask, padding, is_causal)
        if self.norm_first:
            gathered = self._gather(self.norm1(src), mask, padding, is_causal)
            normalised, x = residual_dropout_layer_norm(src, gathered, self.dropout1, self.norm2)
            return residual_dropout(x, self._feed_forward(normalised), self.dropout2)
        gathered = self._gather(src, mask, padding, is_causal)
        x, _ = residual_dropout_layer_norm(src, gathered, self.dropout1, self.norm1)
        return residual_dropout_layer_norm(x, self._feed_forward(x), self.dropout2, self.norm2)[0]

    def _with_own_parts(self, src: Tensor, mask: Tensor | None, padding: Tensor | None, is_causal: bool) -> Tensor:
        """For a subclass that computes its parts in another way, under the names that they have in torch.nn's layer."""
        if self.norm_first:
            x = src + self._sa_block(self.norm1(src), mask, padding, is_causal=is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(src + self._sa_block(src, mask, padding, is_causal=is_causal))
        return self.norm2(x + self._ff_block(x))

    def _gather(self, x: Tensor, mask: Tensor | None, padding: Tensor | None, is_causal: bool) -> Tensor:
        gathered, _ = self.self_attn(
            x, x, x, attn_mask=mask, key_padding_mask=padding, need_weights=False, is_causal=is_causal
        )
        return gathered

    def _feed_forward(self, x: Tensor) -> Tensor:
        return feed_forward(x, self.linear1, self.activation, self.dropout, self.linear2)

    def _ff_block(self, x: Tensor) -> Tensor:
        return self.dropout2(self._feed_forward(x))


def _changed(layer: TransformerEncoderLayer) -> bool:
    """Whether a subclass, or this very layer, has parts of its own in place of ours."""
    own = TransformerEncoderLayer
    return (
        getattr(layer._sa_block, "__func__", None) is not own._sa_block
        or getattr(layer._ff_block, "__func__", None) is not own._ff_block
    )
