"""The MultiheadAttention layer."""

from typing import Any

import torch
from torch import Tensor

from nacre.core.choice import FLOATS, sizes_decide, torch_instead, torch_is_ahead, unserved
from nacre.core.dispatch import recordable, unobserved
from nacre.core.tracing import Proxy, as_torchs_layer, traced
from nacre.layers.attention.layout import each_once
from nacre.layers.attention.multi_head import multi_head_attention_forward
from nacre.layers.attention.multi_head_checks import check_heads

_TORCH_BELOW = 1 << 24  # multiply-adds of the projections
_UNDER = f"{_TORCH_BELOW:,} multiply-adds of the projections and no backward"


class MultiheadAttention(torch.nn.MultiheadAttention):
    r"""Lets every token gather from others what it asks for, with several heads that ask for different things.

    .. math:: \mathrm{head}_h = \mathrm{softmax}\left(\frac{Q_h K_h^\top}{\sqrt{E / H}} + M\right) V_h, \qquad
        y = [\mathrm{head}_1, \dots, \mathrm{head}_H] W_o^\top + b_o

    where :math:`Q = q W_q^\top + b_q`, :math:`K = k W_k^\top + b_k` and :math:`V = v W_v^\top + b_v` are split into H
    heads along their features.

    Args:
        embed_dim: features of the query and of the output, E.
        num_heads: heads, H, each of E / H features.
        dropout: the probability with which a weight is dropped in training, the others grow by 1 / (1 - dropout).
            Default: 0.0.
        bias: learn biases of all projections. Default: True.
        add_bias_kv: learn one key and value more, which follow those of the input. Default: False.
        add_zero_attn: end the keys and values with a row of zeros. Default: False.
        kdim: features of the key. Default: E.
        vdim: features of the value. Default: E.
        batch_first: inputs and output are (N, L, E) instead of (L, N, E). Default: False.
        device: where the parameters are made. Default: torch's default device.
        dtype: of the parameters. Default: torch's default dtype.

    Shape:
        - query: (L, N, E), or (N, L, E) with ``batch_first``, or (L, E) without a batch
        - key and value: (S, N, kdim) and (S, N, vdim), or batch first or without a batch as the query
        - key_padding_mask: (N, S), or (S) without a batch
        - attn_mask: (L, S), or (N H, L, S) for a mask of each head
        - output: as the query; weights: (N, L, S), or (N, H, L, S) if not averaged; without N if there is no batch

    Numerics:
        Scores and weights of float16 and bfloat16 are computed in float32, each projection is rounded once. The weights
        are computed again in the backward, never kept; their mean over the heads is added up as they are computed, so
        that no matrix of each head is held, and rounded once. A query whose every key is masked gets NaN where the
        weights are returned, as in torch.nn, and otherwise attends to nothing. Keys and values that are NaN or infinite
        may or may not show in the results of queries which they are hidden from: blocks that nobody sees are skipped.

    Raises:
        AssertionError: num_heads does not divide embed_dim; shapes of query, key, value or masks do not fit together.
        ValueError: embed_dim or num_heads is not positive.
        RuntimeError: batch sizes, the shape of attn_mask, dtypes or devices do not match; is_causal without attn_mask.

    Cost:
        4 E^2 + 4 E parameters; 8 N L E^2 + 4 N L^2 E FLOPs for self-attention, also where it is causal, and twice plus
        2 N L^2 E that backward; about 5 N L E values kept for the backward, none of them of size L^2.

    Paper:
        Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762.

    Example:
        >>> import torch, nacre
        >>> layer = nacre.MultiheadAttention(512, 8, batch_first=True)
        >>> tokens = torch.ones(2, 5, 512)
        >>> output, weights = layer(tokens, tokens, tokens)
        >>> output.shape, weights.shape
        (torch.Size([2, 5, 512]), torch.Size([2, 5, 5]))
        >>> weights[0, 0]
        tensor([0.2000, 0.2000, 0.2000, 0.2000, 0.2000], grad_fn=<...>)
        >>> sum(parameter.numel() for parameter in layer.parameters())
        1050624
    """

    __prepare_scriptable__ = as_torchs_layer

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if embed_dim > 0 and num_heads > 0:
            check_heads(embed_dim, num_heads)
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Output and weights, None unless they are needed.

        Args:
            query: what each token asks for.
            key: what the queries are compared with.
            value: what is gathered.
            key_padding_mask: bool, True where a key is ignored, or numbers which are added to its scores.
            need_weights: return the weights too. Default: True.
            attn_mask: bool, True where a query ignores a key, or numbers which are added to the scores.
            average_attn_weights: the returned weights are the mean over the heads. Default: True.
            is_causal: a hint that ``attn_mask`` is the causal mask, which then need not be read. Default: False.
        """
        if type(query) is not Tensor and isinstance(query, Proxy):
            settings = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
            return traced(self, query, key, value, *settings)
        if reason := unserved(query, key, value):
            return torch_instead(
                "attention",
                reason,
                super().forward,
                *(query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal),
            )
        no_mask = key_padding_mask is None and attn_mask is None and not is_causal
        if (
            no_mask
            and self._is_small(query, key, value)
            and sizes_decide(query)
            and torch_is_ahead("attention", _UNDER)
        ):
            return super().forward(query, key, value, None, need_weights, None, average_attn_weights)
        sequence_second = self.batch_first and query.dim() == key.dim() == value.dim() == 3
        if sequence_second:
            query, key, value = each_once(lambda tokens: recordable(tokens).transpose(0, 1), query, key, value)
        output, weights = multi_head_attention_forward(
            *(query, key, value, self.embed_dim, self.num_heads, self.in_proj_weight, self.in_proj_bias),
            *(self.bias_k, self.bias_v, self.add_zero_attn, self.dropout, self.out_proj.weight, self.out_proj.bias),
            *(self.training, key_padding_mask, need_weights, attn_mask, not self._qkv_same_embed_dim),
            *(self.q_proj_weight, self.k_proj_weight, self.v_proj_weight),
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        if sequence_second:
            output = output.transpose(0, 1)
            if not (self.training or torch.is_grad_enabled()):
                output = output.contiguous()  # as torch's own inference path returns it
        return output, weights

    def _is_small(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether nothing will be differentiated, and inputs which plainly fit take few multiply-adds to project."""
        to_itself = key is query and value is query
        if self.training or torch.is_grad_enabled() or not unobserved((query,) if to_itself else (query, key, value)):
            return False
        parameters = self._parameters  # where torch.nn, asked for one by its name, looks last
        weight = parameters["in_proj_weight"]
        if weight is None or parameters.get("bias_k") is not None or self.add_zero_attn:
            return False
        shape, others = query.shape, key.shape
        if len(shape) != 3 or shape[2] != self.embed_dim or 0 in shape:
            return False
        if 2 * self.embed_dim * (query.numel() + key.numel()) >= _TORCH_BELOW:
            return False
        if not to_itself:
            batch = 0 if self.batch_first else 1
            if others != value.shape or len(others) != 3 or others[2] != shape[2] or others[batch] != shape[batch]:
                return False
            if not (key.dtype is value.dtype is query.dtype and key.is_cpu and value.is_cpu and key.numel()):
                return False
        return query.dtype is weight.dtype and query.is_cpu and weight.is_cpu and query.dtype in FLOATS
