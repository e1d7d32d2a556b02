"""The comparison table of all layers, computed from their specifications."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nacre.blocks import BLOCKS
from nacre.core.cost import Cost
from nacre.core.spec import Case, LayerSpec
from nacre.layers import LAYERS


@dataclass(frozen=True)
class LayerRow:
    """A layer with the bill of one of its cases.

    Args:
        layer: the class and the arguments of the case.
        purpose: what it is for.
        input: the shapes of the inputs of the case.
        bill: parameters, FLOPs, bytes.
        complexity: growth of time and of the memory kept for the backward.
    """

    layer: str
    purpose: str
    input: str
    bill: Cost
    complexity: str


def layer_table() -> list[LayerRow]:
    """A row for each layer and block: its bill for the first of its cases that users run.

    Nothing is computed and no memory is taken: the inputs are fake tensors.

    Example:
        >>> rows = layer_table()
        >>> next(row.bill.parameters for row in rows if row.layer.startswith("LayerNorm"))
        128
    """
    return [_row(spec) for spec in (*LAYERS.values(), *BLOCKS.values())]


def _row(spec: LayerSpec) -> LayerRow:
    case = next((case for case in spec.cases if case.bench), spec.cases[0])
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer = spec.layer(**case.arguments)
        inputs, keywords = case.make()
        sizes = spec.sizes(layer, *inputs, **keywords)
    return LayerRow(call_of(spec, case), spec.purpose, shapes_of(inputs), spec.cost(**sizes), spec.complexity)


def call_of(spec: LayerSpec, case: Case) -> str:
    """The class with the arguments of a case, as a reader would write them."""
    return f"{spec.layer.__name__}({', '.join(str(value) for value in case.arguments.values())})"


def shapes_of(inputs: object) -> str:
    """The shapes of the tensors among the inputs.

    Example:
        >>> shapes_of((torch.ones(2, 3), [torch.ones(4)]))
        '2x3, 4'
    """
    return ", ".join("x".join(map(str, tensor.shape)) for tensor in _tensors(inputs))


def _tensors(inputs: object) -> Iterator[torch.Tensor]:
    if isinstance(inputs, torch.Tensor):
        yield inputs
    elif isinstance(inputs, (tuple, list)):
        for item in inputs:
            yield from _tensors(item)
