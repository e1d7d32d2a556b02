"""nacre: neural-network layers with nothing hidden, drop-in for ``torch.nn``."""

from nacre import functional
from nacre.layers import LAYERS
from nacre.layers.layer_norm import LayerNorm

__version__ = "0.1.0"

__all__ = ["LAYERS", "LayerNorm", "functional"]
