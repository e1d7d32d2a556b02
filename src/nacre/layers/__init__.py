"""The layers, one folder each; ``LAYERS`` names them all, one line a folder."""

from nacre.core.spec import LayerSpec
from nacre.layers import (
    layer_norm,
)

LAYERS: dict[str, LayerSpec] = {
    spec.name: spec
    for folder in (
        layer_norm,
    )
    for spec in folder.SPECS
}
