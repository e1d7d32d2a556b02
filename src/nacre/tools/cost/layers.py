"""Which modules a layer's formula bills."""

from torch import nn

from nacre.core.spec import LayerSpec
from nacre.layers import LAYERS

SPECS: dict[type, LayerSpec] = {
    kind: spec for spec in LAYERS.values() for kind in (spec.layer, spec.replaces) if kind is not None
}
"""The layers of nacre and the torch.nn layers that they replace."""


def spec_of(module: nn.Module) -> LayerSpec | None:
    """The layer whose forward a module runs, where nothing of it is replaced."""
    kind = next((base for base in type(module).__mro__ if base in SPECS), None)
    if kind is None or nn.utils.parametrize.is_parametrized(module):
        return None
    convolution = "_conv_forward"
    if getattr(type(module), convolution, None) is not getattr(kind, convolution, None):
        return None
    return SPECS[kind]
