"""The products of one place of a recurrence, as :mod:`nacre.layers.recurrent.cost` counts those of a layer."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nacre.core.flop_counter import count_flops
from nacre.core.op import Op


def count_places(op: Op) -> None:
    """Has torch's counter count a recurrence without its formula, whose loop over time would take long."""
    grads = [f"grad_{name}" for name in op.returns[: op.outputs]]

    def named(names: Sequence[str], flops: Callable[[Mapping[str, Any]], int]) -> Callable[..., int]:
        return lambda result, *arguments: flops(dict(zip(names, arguments, strict=True)))

    def backward(given: Mapping[str, Any]) -> int:
        return backward_flops(given, dict(zip(op.gradients, given["needs"], strict=True)))

    count_flops(op, named(op.arguments, forward_flops), named((*grads, *op.saved, "needs"), backward))


def forward_flops(given: Mapping[str, Any]) -> int:
    """Each row times each weight: of the input, of the state, of the projection."""
    weights = (given["weight_ih"], given["weight_hh"], given.get("weight_hr"))
    return 2 * math.prod(given["input"].shape[:-1]) * sum(weight.numel() for weight in weights if weight is not None)


def backward_flops(given: Mapping[str, Any], needs: Mapping[str, bool]) -> int:
    """The gradients that are asked for, and those that go from step to step."""
    rows = math.prod(given["input"].shape[:-1])
    sizes, reverse = given["batch_sizes"], given["reverse"]
    first_rows = int(sizes[-1]) if reverse and sizes is not None else given["h0"].shape[0]
    projection = given.get("weight_hr")
    state_rows = rows - first_rows * (not needs["h0"]) + rows * needs["weight_hh"]
    products = state_rows * given["weight_hh"].numel()
    products += rows * given["weight_ih"].numel() * (needs["input"] + needs["weight_ih"])
    if projection is not None:
        products += rows * projection.numel() * (1 + needs["weight_hr"])
    return 2 * products
