"""Blocks: layers put together; their cost is the sum of their parts."""

from nacre.blocks import residual, transformer_specs
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

BLOCKS: dict[str, LayerSpec] = {spec.name: spec for spec in (*residual.SPECS, *transformer_specs.SPECS)}
