"""CrossEntropyLoss and LinearCrossEntropyLoss.

To be read in this order: tokens.py (one token), formula.py, linear_map.py, linear_formula.py, cost.py, targets.py,
layer.py, linear_base.py, linear_checks.py, linear_layer.py, kernel_cpu.cpp, linear_kernel_cpu.cpp, cases.py.
"""

import torch

from nacre.core.spec import LayerSpec
from nacre.layers.cross_entropy.cases import CASES, LINEAR_CASES
from nacre.layers.cross_entropy.cost import (
    COMPLEXITY,
    LETTERS,
    LINEAR_COMPLEXITY,
    LINEAR_LETTERS,
    cost,
    linear_cost,
    linear_sizes,
    sizes,
)
from nacre.layers.cross_entropy.layer import CrossEntropyLoss, cross_entropy
from nacre.layers.cross_entropy.linear_layer import LinearCrossEntropyLoss, linear_cross_entropy

__all__ = ["SPECS", "CrossEntropyLoss", "LinearCrossEntropyLoss", "cross_entropy", "linear_cross_entropy"]

SPECS = (
    LayerSpec(
        name="cross_entropy",
        layer=CrossEntropyLoss,
        replaces=torch.nn.CrossEntropyLoss,
        purpose="how far predicted classes are from the true ones",
        complexity=COMPLEXITY,
        operators=("cross_entropy",),
        sizes=sizes,
        cost=cost,
        cases=CASES,
        letters=LETTERS,
    ),
    LayerSpec(
        name="linear_cross_entropy",
        layer=LinearCrossEntropyLoss,
        replaces=getattr(torch.nn, "LinearCrossEntropyLoss", None),  # torch 2.13 and later
        purpose="a classifier's last linear map and its loss, without every logit at once",
        complexity=LINEAR_COMPLEXITY,
        operators=("linear_cross_entropy",),
        sizes=linear_sizes,
        cost=linear_cost,
        cases=LINEAR_CASES,
        letters=LINEAR_LETTERS,
    ),
)
