"""Softmax and LogSoftmax: formula.py, cost.py, layer.py, kernel_cpu.cpp and cases.py, to be read in this order."""

import torch

from nacre.core.spec import LayerSpec
from nacre.layers.softmax.cases import CASES
from nacre.layers.softmax.cost import COMPLEXITY, LETTERS, log_softmax_cost, sizes, softmax_cost
from nacre.layers.softmax.layer import LogSoftmax, Softmax, log_softmax, softmax, softmax_jacobian

__all__ = ["SPECS", "LogSoftmax", "Softmax", "log_softmax", "softmax", "softmax_jacobian"]

SPECS = (
    LayerSpec(
        name="softmax",
        layer=Softmax,
        replaces=torch.nn.Softmax,
        purpose="makes probabilities of scores",
        complexity=COMPLEXITY,
        operators=("softmax",),
        sizes=sizes,
        cost=softmax_cost,
        cases=CASES,
        letters=LETTERS,
    ),
    LayerSpec(
        name="log_softmax",
        layer=LogSoftmax,
        replaces=torch.nn.LogSoftmax,
        purpose="makes logarithms of probabilities of scores",
        complexity=COMPLEXITY,
        operators=("log_softmax",),
        sizes=sizes,
        cost=log_softmax_cost,
        cases=CASES,
        letters=LETTERS,
    ),
)
