"""The functional forms of the layers, with the names and signatures of ``torch.nn.functional``."""

from nacre.layers.activation import gelu, relu, sigmoid, silu, tanh
from nacre.layers.attention import multi_head_attention_forward, scaled_dot_product_attention
from nacre.layers.conv2d import conv2d
from nacre.layers.cross_entropy import cross_entropy, linear_cross_entropy
from nacre.layers.dropout import dropout
from nacre.layers.embedding import embedding
from nacre.layers.layer_norm import layer_norm
from nacre.layers.linear import linear
from nacre.layers.softmax import log_softmax, softmax, softmax_jacobian

__all__ = [
    "conv2d",
    "cross_entropy",
    "dropout",
    "embedding",
    "gelu",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "log_softmax",
    "multi_head_attention_forward",
    "relu",
    "scaled_dot_product_attention",
    "sigmoid",
    "silu",
    "softmax",
    "softmax_jacobian",
    "tanh",
]
