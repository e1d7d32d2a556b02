"""nacre: neural-network layers with nothing hidden, drop-in for ``torch.nn``."""

from nacre import functional, memory, threads
from nacre.blocks import (
    BLOCKS,
    ResidualBlock,
    ResidualDropout,
    ResidualDropoutLayerNorm,
    TransformerBlock,
    TransformerEncoderLayer,
)
from nacre.layers import LAYERS
from nacre.layers.activation import GELU, ReLU, Sigmoid, SiLU, Tanh
from nacre.layers.attention import MultiheadAttention
from nacre.layers.conv2d import Conv2d
from nacre.layers.cross_entropy import CrossEntropyLoss, LinearCrossEntropyLoss
from nacre.layers.dropout import Dropout
from nacre.layers.embedding import Embedding
from nacre.layers.layer_norm import LayerNorm
from nacre.layers.linear import Linear
from nacre.layers.recurrent import GRU, LSTM
from nacre.layers.softmax import LogSoftmax, Softmax
from nacre.tools.convert import ConversionReport, convert
from nacre.tools.cost import CostError, CostReport, cost
from nacre.tools.explain import Explanation, explain
from nacre.tools.gradcheck import GradientError, GradientReport, GradientResult, gradcheck

__version__ = "0.1.0"

__all__ = [
    "BLOCKS",
    "Conv2d",
    "ConversionReport",
    "convert",
    "cost",
    "CostError",
    "CostReport",
    "CrossEntropyLoss",
    "Dropout",
    "Embedding",
    "explain",
    "Explanation",
    "functional",
    "GELU",
    "gradcheck",
    "GradientError",
    "GradientReport",
    "GradientResult",
    "GRU",
    "LayerNorm",
    "LAYERS",
    "Linear",
    "LinearCrossEntropyLoss",
    "LogSoftmax",
    "LSTM",
    "memory",
    "MultiheadAttention",
    "ReLU",
    "ResidualBlock",
    "ResidualDropout",
    "ResidualDropoutLayerNorm",
    "Sigmoid",
    "SiLU",
    "Softmax",
    "Tanh",
    "threads",
    "TransformerBlock",
    "TransformerEncoderLayer",
]
