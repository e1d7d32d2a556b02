"""Blocks: layers put together; their cost is the sum of their parts."""

from nacre.core.spec import LayerSpec

BLOCKS: dict[str, LayerSpec] = {}
