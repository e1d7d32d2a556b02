"""What is run to learn how long each kind of operator takes.

A probe is a small piece of a model at one point of a grid of sizes. It runs forward and backward once, while its
operators are noted; then each of the kinds that it is for is called again by itself, many times, on the same tensors.
They lie near the processor then: what the way from memory costs is known from copies.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nacre.core.choice import kernels_at_any_size
from nacre.tools.cost.grid import Grid, Measured, Point, measured
from nacre.tools.cost.operators import Work, work_of
from nacre.tools.cost.pieces import Step

SECONDS = 0.003
"""Of a row of calls of one kind at one point; at least one call."""


@dataclass(frozen=True)
class Probe:
    """Kinds that are measured together.

    Args:
        kinds: their names.
        axes: the points of the grid.
        build: makes what is run at a point, from a dtype and the sizes.
    """

    kinds: tuple[str, ...]
    axes: tuple[tuple[int, ...], ...]
    build: Callable[..., Step]

    def grids(self, dtype: torch.dtype) -> dict[str, Grid]:
        """A table for each of the kinds that run."""
        with torch.enable_grad(), kernels_at_any_size(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return measured(self.axes, lambda point: self._measure(dtype, point))

    def _measure(self, dtype: torch.dtype, point: Point) -> dict[str, Measured]:
        times = {}
        try:
            found = _calls(self.build(dtype, *point), point)
            with torch.no_grad():
                for kind in self.kinds:
                    if kind in found:
                        work, call = found[kind]
                        times[kind] = (least(call), float(work.flops or work.bytes))
        except RuntimeError:  # an operator that this torch does not have for the dtype
            return {}
        return times


class _Noting(TorchDispatchMode):
    """Keeps the operators that run, with their arguments: one of each kind, if it can be of the sizes in question."""

    def __init__(self, sizes: Point) -> None:
        super().__init__()
        self.sizes = sizes
        self.found: dict[str, tuple[Work, Step]] = {}

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        keywords = keywords or {}
        result = operator(*arguments, **keywords)
        work = work_of(operator, arguments, keywords, result)
        if work.kind not in self.found or work.sizes == self.sizes:
            self.found[work.kind] = (work, lambda: operator(*arguments, **keywords))
        return result


def _calls(step: Step, sizes: Point) -> dict[str, tuple[Work, Step]]:
    with _Noting(sizes) as noting:
        result = step()
        results = [one for one in (result if isinstance(result, tuple) else (result,)) if one.requires_grad]
        if results:
            torch.autograd.backward(results, [torch.ones_like(one) for one in results])
    return noting.found


def least(call: Step) -> float:
    """Seconds of one call, in the fastest of some rows of calls: others' work on the machine only adds to it."""
    call()
    start = time.perf_counter()
    call()
    second = time.perf_counter() - start
    count = max(1, min(200, int(SECONDS / max(second, 1e-6))))
    rows = [second]
    for _ in range(4 if second < 10 * SECONDS else 2):
        start = time.perf_counter()
        for _ in range(count):
            call()
        rows.append((time.perf_counter() - start) / count)
    return min(rows)
