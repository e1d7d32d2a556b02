"""Times each row of a bill on this machine: every call again by itself, on the inputs that it had."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nacre.tools.convert import ConversionReport, convert
from nacre.tools.cost.patches import recording
from nacre.tools.cost.recorder import Recorder
from nacre.tools.cost.report import CostReport
from nacre.tools.cost.stage import mapped, returned, staged, tensors

ROUNDS = 5
SECONDS = 0.5
"""A row is timed in so many rounds, but begins no further one after so long, once it has had three."""

Progress = Callable[[int, int, str], None]


def measure_rows(
    report: CostReport, model: nn.Module, inputs: Any, keywords: Any, progress: Progress | None = None
) -> None:
    """Fills in the measured times, with what was expected, the limit, and what the model takes once converted.

    The model is left as it was: its parameters' gradients, its buffers and torch's random state.

    Args:
        report: the bill of the same model and inputs.
        model: with values.
        inputs: positional, with values.
        keywords: the same by keyword.
        progress: is told how many rows are done, of how many, and the name of the next.
    """
    report.predict()
    with torch.random.fork_rng(devices=[]), staged(model, real=True) as stage:
        noting = _Noting(model)
        with recording(noting):
            model(*stage.values(inputs), **stage.values(dict(keywords)))
        rows = report.rows
        for place, (row, call) in enumerate(zip(rows, noting.given, strict=True)):
            if progress is not None:
                progress(place, len(rows), row.name or "(model)")
            row.measured_forward_seconds, row.measured_backward_seconds = _time(call)
        report.converted_seconds = _converted_seconds(model, noting.given[0])
        if progress is not None:
            progress(len(rows), len(rows), "")


def _converted_seconds(model: nn.Module, call: "_Given") -> float | None:
    """Forward and backward of the model with nacre's layers; None where there is none to convert."""
    classes = [(module, type(module)) for module in model.modules()]
    done = ConversionReport()
    try:
        convert(model, report=done)
        return sum(_time(call)) if done.converted else None
    finally:
        for module, kind in classes:
            module.__class__ = kind


@dataclass(eq=False)
class _Given:
    """What a call of a module was given; ``changed`` where it wrote into some of it."""

    module: nn.Module
    arguments: Any
    keywords: Any
    changed: bool = False


class _Noting(Recorder):
    """Notes the inputs of every call for which the bill has a row."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.given: list[_Given] = []
        self._open: list[tuple[_Given, list[tuple[Tensor, int]]]] = []

    def enter(self, module: nn.Module, arguments: Any, keywords: Any) -> Any:
        given = _Given(module, _apart(arguments), _apart(keywords))
        self.given.append(given)
        self._open.append((given, [(tensor, _version(tensor)) for tensor in tensors((arguments, keywords))]))
        return super().enter(module, arguments, keywords)

    def leave(self, frame: Any, result: Any) -> None:
        given, versions = self._open.pop()
        given.changed = any(_version(tensor) != version for tensor, version in versions)
        super().leave(frame, result)


def _version(tensor: Tensor) -> int:
    """How often a tensor was written into; nobody counts it for one that was made in inference mode."""
    return 0 if tensor.is_inference() else tensor._version


def _time(given: _Given) -> tuple[float, float]:
    module = given.module
    forward: list[float] = []
    backward: list[float] = []
    begun = time.perf_counter()
    for round_ in range(ROUNDS + 1):
        inputs, named = _apart((given.arguments, given.keywords))
        passed = _copied((inputs, named)) if given.changed else (inputs, named)
        start = time.perf_counter()
        result = module(*passed[0], **passed[1])
        middle = time.perf_counter()
        results = [tensor for tensor in returned(result) if tensor.requires_grad]
        gradients = [torch.ones_like(tensor) for tensor in results]
        ready = time.perf_counter()
        if results:
            torch.autograd.backward(results, gradients)
        end = time.perf_counter()
        if round_:  # the first warms up
            forward.append(middle - start)
            backward.append(end - ready if results else 0.0)
        for tensor in (*module.parameters(), *tensors((inputs, named))):
            tensor.grad = None
        if round_ >= 3 and time.perf_counter() - begun > SECONDS:
            break
    return statistics.median(forward), statistics.median(backward)


def _apart(value: Any) -> Any:
    """The same inputs, cut from the graph, with the same wish for gradients; one tensor in two places stays one."""
    return _mapped_once(value, lambda tensor: tensor.detach().requires_grad_(tensor.requires_grad))


def _copied(value: Any) -> Any:
    """Copies that may be written into, through which gradients go on to the inputs."""
    return _mapped_once(value, torch.clone)


def _mapped_once(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    met: dict[int, Tensor] = {}

    def changed(tensor: Tensor) -> Tensor:
        if id(tensor) not in met:
            met[id(tensor)] = change(tensor)
        return met[id(tensor)]

    return mapped(value, changed)
