"""GELU, ReLU, SiLU, Tanh and Sigmoid.

To be read in this order: formula.py, cost.py, functional.py, layer.py, kernel_cpu.cpp and cases.py.
"""

from collections.abc import Callable
from typing import Any

import torch

from nacre.core.spec import Case, LayerSpec
from nacre.layers.activation.cases import GELU_CASES, RELU_CASES, SIGMOID_CASES, SILU_CASES, TANH_CASES
from nacre.layers.activation.cost import (
    COMPLEXITY,
    LETTERS,
    gelu_cost,
    gelu_sizes,
    relu_cost,
    sigmoid_cost,
    silu_cost,
    sizes,
    tanh_cost,
)
from nacre.layers.activation.functional import gelu, relu, sigmoid, silu, tanh
from nacre.layers.activation.layer import GELU, ReLU, Sigmoid, SiLU, Tanh

__all__ = ["GELU", "SPECS", "ReLU", "SiLU", "Sigmoid", "Tanh", "gelu", "relu", "sigmoid", "silu", "tanh"]


def _spec(
    name: str,
    layer: type[torch.nn.Module],
    replaces: type[torch.nn.Module],
    purpose: str,
    cost: Callable[..., Any],
    cases: tuple[Case, ...],
    sizes: Callable[..., Any] = sizes,
) -> LayerSpec:
    return LayerSpec(
        name=name,
        layer=layer,
        replaces=replaces,
        purpose=purpose,
        complexity=COMPLEXITY,
        operators=(name,),
        sizes=sizes,
        cost=cost,
        cases=cases,
        letters=LETTERS,
    )


SPECS = (
    _spec(
        "gelu",
        GELU,
        torch.nn.GELU,
        "a smooth gate: x times the chance that a normal value lies below x",
        gelu_cost,
        GELU_CASES,
        gelu_sizes,
    ),
    _spec("relu", ReLU, torch.nn.ReLU, "keeps what is positive", relu_cost, RELU_CASES),
    _spec("silu", SiLU, torch.nn.SiLU, "a smooth gate: x times its sigmoid", silu_cost, SILU_CASES),
    _spec("tanh", Tanh, torch.nn.Tanh, "squashes numbers into -1 to 1", tanh_cost, TANH_CASES),
    _spec("sigmoid", Sigmoid, torch.nn.Sigmoid, "squashes numbers into 0 to 1", sigmoid_cost, SIGMOID_CASES),
)
