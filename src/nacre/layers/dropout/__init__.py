"""Dropout: formula.py, cost.py, layer.py, residual.py, kernel_cpu.cpp and cases.py, to be read in this order."""

import torch

from nacre.core.spec import LayerSpec
from nacre.layers.dropout.cases import CASES
from nacre.layers.dropout.cost import COMPLEXITY, LETTERS, cost, sizes
from nacre.layers.dropout.layer import Dropout, dropout
from nacre.layers.dropout.residual import residual_dropout

__all__ = ["SPECS", "Dropout", "dropout", "residual_dropout"]

SPECS = (
    LayerSpec(
        name="dropout",
        layer=Dropout,
        replaces=torch.nn.Dropout,
        purpose="drops elements at random in training, against overfitting",
        complexity=COMPLEXITY,
        operators=("dropout",),
        sizes=sizes,
        cost=cost,
        cases=CASES,
        letters=LETTERS,
    ),
)
