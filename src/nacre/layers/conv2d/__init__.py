"""Conv2d: formula.py, cost.py, layer.py, served.py, kernel_cpu.cpp and cases.py, to be read in this order.

by_torch.py: torch's own convolution in the form of the operator, for what it is faster at.
"""

import torch

from nacre.core.spec import LayerSpec
from nacre.layers.conv2d.cases import CASES
from nacre.layers.conv2d.cost import COMPLEXITY, LETTERS, cost, sizes
from nacre.layers.conv2d.layer import Conv2d, conv2d

__all__ = ["SPECS", "Conv2d", "conv2d"]

SPECS = (
    LayerSpec(
        name="conv2d",
        layer=Conv2d,
        replaces=torch.nn.Conv2d,
        purpose="finds local patterns anywhere in an image",
        complexity=COMPLEXITY,
        operators=("conv2d",),
        sizes=sizes,
        cost=cost,
        cases=CASES,
        letters=LETTERS,
    ),
)
