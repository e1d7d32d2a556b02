"""LayerNorm: formula.py, cost.py, layer.py, kernel_cpu.cpp and cases.py, to be read in this order.

residual_formula.py and residual.py: LayerNorm of a residual and of the branch that is added to it.
"""

import torch

from nacre.core.spec import LayerSpec
from nacre.layers.layer_norm.cases import CASES
from nacre.layers.layer_norm.cost import COMPLEXITY, LETTERS, cost, sizes
from nacre.layers.layer_norm.layer import LayerNorm, layer_norm
from nacre.layers.layer_norm.residual import residual_dropout_layer_norm

__all__ = ["SPECS", "LayerNorm", "layer_norm", "residual_dropout_layer_norm"]

SPECS = (
    LayerSpec(
        name="layer_norm",
        layer=LayerNorm,
        replaces=torch.nn.LayerNorm,
        purpose="keeps the scale of each row of features",
        complexity=COMPLEXITY,
        operators=("layer_norm",),
        sizes=sizes,
        cost=cost,
        cases=CASES,
        letters=LETTERS,
    ),
)
