"""Linear: formula.py, cost.py, layer.py, kernel_cpu.cpp and cases.py, to be read in this order.

feed_forward_formula.py and feed_forward.py: two linear maps with an activation between them.
"""

import torch

from nacre.core.spec import LayerSpec
from nacre.layers.linear.cases import CASES
from nacre.layers.linear.cost import COMPLEXITY, LETTERS, cost, sizes
from nacre.layers.linear.feed_forward import feed_forward
from nacre.layers.linear.layer import Linear, linear

__all__ = ["SPECS", "Linear", "feed_forward", "linear"]

SPECS = (
    LayerSpec(
        name="linear",
        layer=Linear,
        replaces=torch.nn.Linear,
        purpose="mixes features by a learned matrix",
        complexity=COMPLEXITY,
        operators=("linear",),
        sizes=sizes,
        cost=cost,
        cases=CASES,
        letters=LETTERS,
    ),
)
