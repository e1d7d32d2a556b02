"""The transformer block; encoder_layer.py has it in torch.nn's form, transformer_specs.py cases and letters of both."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nacre.blocks.fused import feed_forward, residual_dropout, residual_dropout_layer_norm, runs_unseen
from nacre.core import check
from nacre.core.choice import unserved
from nacre.layers.activation import GELU, ReLU, SiLU
from nacre.layers.attention import MultiheadAttention
from nacre.layers.dropout import Dropout
from nacre.layers.layer_norm import LayerNorm
from nacre.layers.linear import Linear

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": GELU,
    "gelu_tanh": partial(GELU, approximate="tanh"),
    "relu": ReLU,
    "silu": SiLU,
}


class TransformerBlock(nn.Module):
    r"""Lets every token gather from the others, then thinks about what it gathered; each time as a change of the token.

    .. math::
        x &\leftarrow x + \mathrm{attn}(\mathrm{norm}_1(x)) \\
        x &\leftarrow x + \mathrm{ff}(\mathrm{norm}_2(x)), \qquad
        \mathrm{ff} = \mathrm{Linear}_{D, rD}, \mathrm{GELU}, \mathrm{Linear}_{rD, D}

    With ``norm_first=False`` the normalisation follows the sum: :math:`x \leftarrow \mathrm{norm}(x + \ldots)`.

    Args:
        dim: features of a token, D.
        num_heads: heads of the attention; they divide ``dim``.
        mlp_ratio: r, hidden features of ``ff`` for each feature of a token. Default: 4.
        dropout: share of values dropped from the attention's weights and from both changes, from 0 to 1. Default: 0.
        causal: a token gathers from itself and earlier ones only. Default: False.
        norm_first: normalise before each part rather than after each sum. Default: True.
        bias: whether linear layers, attention and normalisations learn biases. Default: True.
        eps: added to the variance in the normalisations. Default: 1e-5.
        activation: between the two linear layers, ``"gelu"``, ``"gelu_tanh"``, ``"relu"``, ``"silu"`` or a function
            that makes a module. Default: ``"gelu"``.
        device: where the parameters are made. Default: torch's default device.
        dtype: of the parameters. Default: torch's default dtype.

    Shape:
        - input: (B, T, D), or (T, D) for a single sequence
        - output: as the input

    Numerics:
        Those of its parts; each sum is rounded once.

    Raises:
        ValueError: ``activation`` is no known name, sizes are not positive, or ``dropout`` is outside 0 to 1.
        AssertionError: ``num_heads`` does not divide ``dim``.
        RuntimeError: shapes, dtypes or devices do not match.

    Cost:
        (4 + 2 r) D^2 + 2 D parameters without biases, O(B T D (T + D)) time, the sum of its parts and two additions.

    Paper:
        Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762; normalised first: Xiong et al., 2020,
        arXiv:2002.04745.

    Example:
        >>> import torch, nacre
        >>> block = nacre.TransformerBlock(16, num_heads=2, causal=True)
        >>> block(torch.ones(2, 5, 16)).shape
        torch.Size([2, 5, 16])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4,
        dropout: float = 0.0,
        causal: bool = False,
        norm_first: bool = True,
        bias: bool = True,
        eps: float = 1e-5,
        activation: str | Callable[[], nn.Module] = "gelu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if isinstance(activation, str) and activation not in _ACTIVATIONS:
            names = ", ".join(_ACTIVATIONS)
            rule = f"the activation of a TransformerBlock is one of {names}, or a function that makes a module"
            raise check.error(ValueError, rule, repr(activation))
        hidden = int(dim * mlp_ratio)
        if hidden < 1:
            raise check.error(
                ValueError,
                "a TransformerBlock has at least one hidden feature, dim * mlp_ratio",
                f"dim = {dim} and mlp_ratio = {mlp_ratio}",
            )
        self.causal, self.norm_first = causal, norm_first
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        make = _ACTIVATIONS[activation] if isinstance(activation, str) else activation
        self.norm1 = LayerNorm(dim, eps=eps, bias=bias, **placed)
        self.attn = MultiheadAttention(dim, num_heads, dropout=dropout, bias=bias, batch_first=True, **placed)
        self.dropout1 = Dropout(dropout)
        self.norm2 = LayerNorm(dim, eps=eps, bias=bias, **placed)
        self.ff = nn.Sequential(
            Linear(dim, hidden, bias=bias, **placed), make(), Linear(hidden, dim, bias=bias, **placed)
        )
        self.dropout2 = Dropout(dropout)

    def forward(self, input: Tensor, attn_mask: Tensor | None = None, key_padding_mask: Tensor | None = None) -> Tensor:
        """The changed tokens.

        Args:
            input: tokens of shape (B, T, D) or (T, D).
            attn_mask: (T, T) or (B heads, T, T), True where a token is not to be gathered from, or numbers which are
                added to the scores. Default: none.
            key_padding_mask: (B, T) or (T), True for the tokens which are padding, or numbers. Default: none.
        """
        if self.norm_first:
            gathered = self._gather(self.norm1(input), attn_mask, key_padding_mask)
            normalised, x = residual_dropout_layer_norm(input, gathered, self.dropout1, self.norm2)
            return residual_dropout(x, self._feed_forward(normalised), self.dropout2)
        gathered = self._gather(input, attn_mask, key_padding_mask)
        x, _ = residual_dropout_layer_norm(input, gathered, self.dropout1, self.norm1)
        return residual_dropout_layer_norm(x, self._feed_forward(x), self.dropout2, self.norm2)[0]

    def _feed_forward(self, x: Tensor) -> Tensor:
        if runs_unseen(self.ff, nn.Sequential) and len(self.ff) == 3:
            return feed_forward(x, self.ff[0], self.ff[1], None, self.ff[2])
        return self.ff(x)

    def _gather(self, x: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor:
        hinted = self.causal and attn_mask is None
        if hinted and key_padding_mask is None and runs_unseen(self.attn, MultiheadAttention) and not unserved(x):
            # nobody reads it, so that one value stands for the matrix of tokens by tokens
            attn_mask = torch.ones((), dtype=torch.bool, device=x.device).expand(x.shape[-2], x.shape[-2])
        elif self.causal:
            attn_mask = _with_later_tokens(attn_mask, x)
        gathered, _ = self.attn(
            x, x, x, key_padding_mask=key_padding_mask, need_weights=False, attn_mask=attn_mask, is_causal=hinted
        )
        return gathered

    def extra_repr(self) -> str:
        return f"causal={self.causal}, norm_first={self.norm_first}"


def _with_later_tokens(mask: Tensor | None, x: Tensor) -> Tensor:
    """The mask, which forbids later tokens too."""
    tokens = x.shape[-2]
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).triu(1)
    if mask is None:
        return later
    if mask.dtype is torch.bool:
        return mask | later
    # added, since an addition keeps nothing for the backward of a learned mask
    return mask + torch.zeros_like(later, dtype=mask.dtype).masked_fill(later, -torch.inf)
