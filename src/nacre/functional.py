"""The functional forms of the layers, with the names and signatures of ``torch.nn.functional``."""

from nacre.layers.layer_norm import layer_norm

__all__ = ["layer_norm"]
