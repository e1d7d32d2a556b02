"""Attention: to be read in the order formula.py, packed.py, cost.py, scaled_dot_product.py, multi_head.py, layer.py."""

import torch

from nacre.core.spec import LayerSpec
from nacre.layers.attention.cases import CASES
from nacre.layers.attention.cost import COMPLEXITY, cost, sizes
from nacre.layers.attention.layer import MultiheadAttention
from nacre.layers.attention.multi_head import multi_head_attention_forward
from nacre.layers.attention.scaled_dot_product import scaled_dot_product_attention

__all__ = ["SPECS", "MultiheadAttention", "multi_head_attention_forward", "scaled_dot_product_attention"]

SPECS = (
    LayerSpec(
        name="attention",
        layer=MultiheadAttention,
        replaces=torch.nn.MultiheadAttention,
        purpose="lets every token gather from others what it asks for",
        complexity=COMPLEXITY,
        operators=("attention", "linear"),
        sizes=sizes,
        cost=cost,
        cases=CASES,
    ),
)
