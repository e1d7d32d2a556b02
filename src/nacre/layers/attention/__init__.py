"""Attention: formula.py, packed.py, cost.py, scaled_dot_product.py, projection.py, multi_head.py, layer.py,
kernel_cpu.cpp and cases.py, to be read in this order.

layout.py: how heads lie in memory; masks.py: what a mask comes to; checks.py and multi_head_checks.py: bad input.
"""

import torch

from nacre.core.spec import LayerSpec
from nacre.layers.attention.cases import CASES
from nacre.layers.attention.cost import COMPLEXITY, LETTERS, cost, sizes
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
        letters=LETTERS,
    ),
)
