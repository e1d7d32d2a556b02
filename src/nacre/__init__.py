"""nacre: neural-network layers with nothing hidden, drop-in for ``torch.nn``."""

from nacre import functional
from nacre.layers import LAYERS
from nacre.layers.layer_norm import LayerNorm
from nacre.tools.convert import ConversionReport, convert
from nacre.tools.explain import Explanation, explain

__version__ = "0.1.0"

__all__ = ["ConversionReport", "Explanation", "convert", "explain", "LAYERS", "LayerNorm", "functional"]
