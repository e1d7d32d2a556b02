"""Checks the predicted times: a table of models with what was expected and what was measured."""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nacre.tools.bench.machine import describe, other_load, warnings
from nacre.tools.cost.heap import LARGEST_KEPT
from nacre.tools.cost.models import Model
from nacre.tools.cost.run import cost
from nacre.tools.cost.stage import tensors

SECONDS = 1.0
"""Of rounds for each model, after those which warm up; at least five rounds."""


@dataclass(frozen=True)
class Checked:
    """A model's times: seconds of a training step, forward and backward."""

    name: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """How far the prediction is off: 0.1 is 10 % too long."""
        return self.predicted / self.measured - 1


def check(models: Sequence[Model], progress: Callable[[str], None] | None = None) -> list[Checked]:
    """Predicts and then measures each model's step on this machine.

    Args:
        models: those to check.
        progress: is told the name of each before its turn.
    """
    found = []
    for one in models:
        if progress is not None:
            progress(one.name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, x = one.build()
            found.append(Checked(one.name, cost(model, x).predicted_seconds, step_seconds(model, x)))
        del model
        gc.collect()
    return found


def step_seconds(model: nn.Module, *inputs: Any) -> float:
    """The median time of a forward and a backward with ones for the results' gradients, which it forgets each time."""
    torch.zeros(LARGEST_KEPT // 8)  # from now on the C library keeps blocks of such a size
    times: list[float] = []
    warm = 3
    while len(times) < warm + 5 or sum(times[warm:]) < SECONDS:
        begun = time.perf_counter()
        result = model(*inputs)
        results = [tensor for tensor in tensors(result) if tensor.requires_grad]
        torch.autograd.backward(results, [torch.ones_like(tensor) for tensor in results])
        times.append(time.perf_counter() - begun)
        model.zero_grad()
    return statistics.median(times[warm:])


def markdown(checked: Sequence[Checked]) -> str:
    """The table, and beneath it the median and the largest error."""
    warned = [f"WARNING: {text}" for text in warnings(other_load())]
    lines = [f"{describe()}; float32", *warned, "", "| model | predicted | measured | error |", "|---|---:|---:|---:|"]
    for one in checked:
        times = " | ".join(f"{1e3 * seconds:.3g} ms" for seconds in (one.predicted, one.measured))
        lines.append(f"| {one.name} | {times} | {100 * one.error:+.0f} % |")
    errors = [abs(one.error) for one in checked]
    worst = max(checked, key=lambda one: abs(one.error))
    said = f"Median error {100 * statistics.median(errors):.0f} %, largest {100 * max(errors):.0f} % ({worst.name})."
    return "\n".join([*lines, "", said])
