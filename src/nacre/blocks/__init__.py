"""Blocks: layers put together; their cost is the sum of their parts.

To be read in this order: residual.py, transformer.py and encoder_layer.py; fused.py, what runs in one pass;
inference.py, what torch serves best; parts.py, what a block costs; residual_specs.py and transformer_specs.py, cases
and letters.
"""

from nacre.blocks import residual_specs, transformer_specs
from nacre.blocks.encoder_layer import TransformerEncoderLayer
from nacre.blocks.residual import ResidualBlock, ResidualDropout, ResidualDropoutLayerNorm
from nacre.blocks.transformer import TransformerBlock
from nacre.core.spec import LayerSpec

__all__ = [
    "BLOCKS",
    "ResidualBlock",
    "ResidualDropout",
    "ResidualDropoutLayerNorm",
    "TransformerBlock",
    "TransformerEncoderLayer",
]

BLOCKS: dict[str, LayerSpec] = {spec.name: spec for spec in (*residual_specs.SPECS, *transformer_specs.SPECS)}
