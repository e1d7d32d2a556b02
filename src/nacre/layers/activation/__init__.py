"""GELU, ReLU, SiLU, Tanh and Sigmoid: formula.py, cost.py, layer.py and cases.py, to be read in this order."""

import torch

from nacre.core.spec import LayerSpec
from nacre.layers.activation.cases import GELU_CASES, RELU_CASES, SIGMOID_CASES, SILU_CASES, TANH_CASES
from nacre.layers.activation.cost import (
    COMPLEXITY,
    gelu_cost,
    gelu_sizes,
    relu_cost,
    sigmoid_cost,
    silu_cost,
    sizes,
    tanh_cost,
)
from nacre.layers.activation.layer import GELU, ReLU, Sigmoid, SiLU, Tanh, gelu, relu, sigmoid, silu, tanh

__all__ = ["GELU", "SPECS", "ReLU", "SiLU", "Sigmoid", "Tanh", "gelu", "relu", "sigmoid", "silu", "tanh"]

SPECS = (
    LayerSpec(
        name="gelu",
        layer=GELU,
        replaces=torch.nn.GELU,
        purpose="a smooth gate: x times the chance that a normal value lies below x",
        complexity=COMPLEXITY,
        operators=("gelu",),
        sizes=gelu_sizes,
        cost=gelu_cost,
        cases=GELU_CASES,
    ),
    LayerSpec(
        name="relu",
        layer=ReLU,
        replaces=torch.nn.ReLU,
        purpose="keeps what is positive",
        complexity=COMPLEXITY,
        operators=("relu",),
        sizes=sizes,
        cost=relu_cost,
        cases=RELU_CASES,
    ),
    LayerSpec(
        name="silu",
        layer=SiLU,
        replaces=torch.nn.SiLU,
        purpose="a smooth gate: x times its sigmoid",
        complexity=COMPLEXITY,
        operators=("silu",),
        sizes=sizes,
        cost=silu_cost,
        cases=SILU_CASES,
    ),
    LayerSpec(
        name="tanh",
        layer=Tanh,
        replaces=torch.nn.Tanh,
        purpose="squashes numbers into -1 to 1",
        complexity=COMPLEXITY,
        operators=("tanh",),
        sizes=sizes,
        cost=tanh_cost,
        cases=TANH_CASES,
    ),
    LayerSpec(
        name="sigmoid",
        layer=Sigmoid,
        replaces=torch.nn.Sigmoid,
        purpose="squashes numbers into 0 to 1",
        complexity=COMPLEXITY,
        operators=("sigmoid",),
        sizes=sizes,
        cost=sigmoid_cost,
        cases=SIGMOID_CASES,
    ),
)
