"""Which calls of an encoder layer torch's fused inference path serves best."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from nacre.core.dispatch import unobserved
from nacre.layers.attention import MultiheadAttention
from nacre.layers.dropout import Dropout
from nacre.layers.layer_norm import LayerNorm
from nacre.layers.linear import Linear

_TORCH_BELOW = 1 << 27  # multiply-adds with weights
UNDER = f"{_TORCH_BELOW:,} multiply-adds with weights and no backward"

_PARTS: dict[str, type[nn.Module]] = {
    **{"self_attn": MultiheadAttention, "norm1": LayerNorm, "norm2": LayerNorm},
    **{"linear1": Linear, "linear2": Linear},
    **{"dropout": Dropout, "dropout1": Dropout, "dropout2": Dropout},
}
_ACTIVATIONS: dict[Any, int] = {torch.nn.functional.relu: 1, torch.nn.functional.gelu: 2}


def is_small(layer: nn.TransformerEncoderLayer, src: Tensor) -> bool:
    """Whether torch's fused path takes a call without masks, whose input plainly fits, and the call is small.

    Args:
        layer: the layer, of nacre.
        src: its input.
    """
    if layer.training or torch.is_grad_enabled() or not unobserved((src,)) or _has_any_global_hook():
        return False
    parts = layer._modules  # where torch.nn, asked for a module by its name, looks last
    for name, kind in _PARTS.items():
        own: Any = vars(parts[name])
        if type(parts[name]) is not kind or own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
            return False
    attention, hidden = cast(MultiheadAttention, parts["self_attn"]), cast(Linear, parts["linear1"]).out_features
    width, weight = attention.embed_dim, attention._parameters["in_proj_weight"]
    return (
        src.dim() == 3
        and src.shape[2] == width
        and 0 < src.numel() * (4 * width + 2 * hidden) < _TORCH_BELOW
        and weight is not None
        and src.dtype is weight.dtype
        and src.is_cpu
        and weight.is_cpu
        and attention.batch_first
        and attention.num_heads % 2 == 0
        and attention._parameters["in_proj_bias"] is not None
        and _ACTIVATIONS.get(layer.activation) == layer.activation_relu_or_gelu
        and cast(LayerNorm, parts["norm1"]).eps == cast(LayerNorm, parts["norm2"]).eps
    )
