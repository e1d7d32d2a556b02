"""The layers, one folder each; ``LAYERS`` names them all, one line a folder."""

from nacre.core.spec import LayerSpec
from nacre.layers import (
    activation,
    attention,
    conv2d,
    cross_entropy,
    dropout,
    embedding,
    layer_norm,
    linear,
    recurrent,
    softmax,
)

LAYERS: dict[str, LayerSpec] = {
    spec.name: spec
    for folder in (
        activation,
        attention,
        conv2d,
        cross_entropy,
        dropout,
        embedding,
        layer_norm,
        linear,
        recurrent,
        softmax,
    )
    for spec in folder.SPECS
}
