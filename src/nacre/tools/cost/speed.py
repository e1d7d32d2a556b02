"""The time to expect: what a model does, at the speeds that this machine has been seen to reach.

An operator takes what its products take at the speed of products of their size, or what its traffic takes, whichever is
longer, and what any call takes, however small. Products are timed as a linear layer has them, forward and for both
gradients, and as attention has them. Traffic goes at the speed of a copy as large as the whole step's memory, since
little of it is still in a cache when its turn comes; torch's operators write fresh memory, whose pages the system may
have to find first, nacre's own write memory that is used again. A row's time is the sum over its operators.
"""

import hashlib
import json
import math
import os
import statistics
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nacre.applications.files import replacing
from nacre.core.choice import kernels_at_any_size
from nacre.layers.layer_norm import layer_norm
from nacre.tools.bench.ceilings import copy_bandwidth, matrix_peak
from nacre.tools.bench.machine import describe, other_load, warnings
from nacre.tools.bench.results import Ceilings
from nacre.tools.bench.selection import DTYPES
from nacre.tools.cost.operators import Work
from nacre.tools.cost.report import CostReport

SIDES = (32, 128, 512, 2048)
"""Rows and columns of the square products that are timed."""

SIZES = (2**16, 2**20, 2**24, 2**28)
"""Bytes of the copies that are timed."""

Curve = dict[int, float]
"""A speed for each of some sizes; between them it goes straight on logarithmic scales."""


@dataclass(frozen=True)
class Speeds:
    """What this machine can do, measured.

    Args:
        best: for each dtype the FLOPs a second of the best product there is.
        products: for each dtype the FLOPs a second of the three products of a linear layer, by its rows and features.
        attention: for each dtype the FLOPs a second of attention, forward and backward.
        kept: bytes a second read and written by a copy into memory that is there, by the bytes copied.
        fresh: the same into memory that is taken for each copy.
        draws: random numbers a second, as torch draws a mask.
        call: seconds of the smallest call of an operator of torch, autograd's part included: forward and backward.
        own_call: the same of one of nacre's.
        warnings: what speaks against trusting them.
    """

    best: Mapping[str, float]
    products: Mapping[str, Curve]
    attention: Mapping[str, float]
    kept: Curve
    fresh: Curve
    draws: float
    call: tuple[float, float]
    own_call: tuple[float, float]
    warnings: tuple[str, ...] = ()

    def seconds(self, work: Work, backward: bool, working: int) -> float:
        """The time to expect for one call of an operator.

        Args:
            work: what it does.
            backward: whether autograd calls it in the backward.
            working: bytes of the memory that the whole step goes through.
        """
        dtype = work.dtype if work.dtype in self.best else next(iter(self.best))
        curve = self.products[dtype]
        speed = at(curve, max(round(work.product ** (1 / 3)), 1))
        products = work.flops / (min(speed, self.attention[dtype]) if work.attention else speed)
        bandwidth = at(self.kept, max(work.bytes, working) // 2)
        if not work.own:
            bandwidth = min(bandwidth, at(self.fresh, work.bytes // 2))
        traffic = work.bytes / bandwidth
        return max(products, traffic, work.random / self.draws) + (self.own_call if work.own else self.call)[backward]

    def ceilings(self, dtype: str) -> Ceilings:
        """The best that was measured: products of a dtype, and copies too large for the caches."""
        return Ceilings(self.best.get(dtype) or next(iter(self.best.values())), self.kept[max(self.kept)])

    def as_json(self) -> dict[str, Any]:
        """Plain values, for a file."""
        return asdict(self)

    @staticmethod
    def from_json(values: Any) -> "Speeds":
        """Speeds from what ``as_json`` made of them.

        Raises:
            ValueError: they are none.
        """
        try:
            return Speeds(
                {str(dtype): _positive(speed) for dtype, speed in values["best"].items()},
                {str(dtype): _curve(values["products"][dtype]) for dtype in values["best"]},
                {str(dtype): _positive(values["attention"][dtype]) for dtype in values["best"]},
                _curve(values["kept"]),
                _curve(values["fresh"]),
                _positive(values["draws"]),
                _pair(values["call"]),
                _pair(values["own_call"]),
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"these are no speeds of a machine: {error}") from error


def at(curve: Curve, size: int) -> float:
    """The speed at a size: between two measured ones, or that of the nearest.

    Example:
        >>> round(at({10: 1.0, 1000: 100.0}, 100), 6), at({10: 1.0, 1000: 100.0}, 1)
        (10.0, 1.0)
    """
    sizes = sorted(curve)
    place = bisect_left(sizes, size)
    if place == 0 or place == len(sizes):
        return curve[sizes[min(place, len(sizes) - 1)]]
    low, high = sizes[place - 1], sizes[place]
    share = math.log(size / low) / math.log(high / low)
    return math.exp((1 - share) * math.log(curve[low]) + share * math.log(curve[high]))


def _curve(values: Mapping[str, float]) -> Curve:
    curve = {int(size): _positive(speed) for size, speed in values.items()}
    if not curve:
        raise ValueError("a speed is known for some size")
    return curve


def _positive(value: Any) -> float:
    if not 0 < float(value) < math.inf:
        raise ValueError("a speed is greater than 0")
    return float(value)


def _pair(values: Any) -> tuple[float, float]:
    forward, backward = (float(value) for value in values)
    if not (0 <= forward < 1 and 0 <= backward < 1):
        raise ValueError("a call takes less than a second")
    return forward, backward


def predict(report: CostReport, speeds: Speeds | None = None) -> None:
    """Fills in what each row is expected to take, and the least that it can take.

    Args:
        report: the bill.
        speeds: of the machine. Default: this one's, measured at the first time and then kept in a file.
    """
    dtypes = _dtypes(report)
    speeds = speeds or machine_speeds(dtypes)
    report.warnings = speeds.warnings
    report.machine, report.ceilings = describe(), speeds.ceilings(dtypes[0])
    for place in reversed(range(len(report.rows))):  # what lies within comes after
        row = report.rows[place]
        within = [report.rows[child] for child in report.children(place)]
        own = sum(count * speeds.seconds(work, False, report.peak_bytes) for work, count in row.forward_work.items())
        own += sum(count * speeds.seconds(work, True, report.peak_bytes) for work, count in row.backward_work.items())
        row.predicted_seconds = own + sum(child.predicted_seconds or 0.0 for child in within)
        least = report.ceilings.seconds(row.own.flops, row.own.bytes)
        least += report.ceilings.seconds(row.own.backward_flops, row.own.backward_bytes)
        row.limit_seconds = least + sum(child.limit_seconds or 0.0 for child in within)


def _dtypes(report: CostReport) -> list[str]:
    """The dtypes of the model's products, the one with most FLOPs first; float32 where there are none."""
    flops: dict[str, int] = {}
    for row in report.rows:
        for works in (row.forward_work, row.backward_work):
            for work, count in works.items():
                if work.flops and work.dtype in DTYPES:
                    flops[work.dtype] = flops.get(work.dtype, 0) + work.flops * count
    return sorted(flops, key=lambda dtype: -flops[dtype]) or ["float32"]


def cache_file() -> Path:
    """Where this machine's speeds are kept: a file for each processor, number of threads and version of torch."""
    if sys.platform == "win32":
        folder = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
    else:
        folder = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    machine = describe()
    key = (machine.processor, machine.cores, machine.instructions, machine.threads, machine.kernels, machine.versions)
    name = hashlib.sha256(json.dumps([*key, machine.environment], sort_keys=True).encode()).hexdigest()[:16]
    return Path(folder) / "nacre" / f"speeds-{name}.json"


def machine_speeds(dtypes: list[str]) -> Speeds:
    """This machine's speeds, from the file or measured now; a damaged file is measured anew.

    What was measured while other processes worked is not kept.

    Args:
        dtypes: those whose products are asked for.
    """
    path = cache_file()
    try:
        known = Speeds.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        known = None
    if known is not None and all(dtype in known.best for dtype in dtypes):
        return known
    doubts = tuple(warnings(other_load()))
    speeds = known or _speeds()
    for dtype in dtypes:
        if dtype not in speeds.best:
            speeds = replace(
                speeds,
                best={**speeds.best, dtype: matrix_peak(DTYPES[dtype], SIDES[-1])},
                products={**speeds.products, dtype: {side: _linear(DTYPES[dtype], side) for side in SIDES}},
                attention={**speeds.attention, dtype: _attention(DTYPES[dtype])},
            )
    if doubts:
        return replace(speeds, warnings=doubts)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_text(json.dumps(speeds.as_json()), encoding="utf-8")
    except OSError:
        pass  # nowhere to keep them: they are measured again the next time
    return speeds


def _speeds() -> Speeds:
    """What does not depend on a dtype."""
    kept, fresh = ({size: copy(size) for size in SIZES} for copy in (copy_bandwidth, _fresh))
    return Speeds({}, {}, {}, kept, fresh, _draws(2**20), _call(_torchs), _call(_own))


def _linear(dtype: torch.dtype, side: int) -> float:
    x, weight, gradient = torch.randn(3, side, side).to(dtype)
    with torch.no_grad():
        forward, input_gradient, weight_gradient = (
            _typical(lambda one=one, other=other: torch.mm(one, other))  # type: ignore[misc]
            for one, other in ((x, weight.t()), (gradient, weight), (gradient.t(), x))
        )
    return 6 * side**3 / (forward + input_gradient + weight_gradient)


def _attention(dtype: torch.dtype) -> float:
    heads, tokens, features = 8, 256, 64
    shape = (1, heads, tokens, features)
    query, key, value, gradient = (torch.randn(shape).to(dtype) for _ in range(4))
    inputs = (query.requires_grad_(), key.requires_grad_(), value.requires_grad_())

    def step() -> None:
        result = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        torch.autograd.grad(result, inputs, gradient)

    with torch.enable_grad():
        return 7 * 2 * heads * tokens * tokens * features / _typical(step)


def _fresh(size: int) -> float:
    source = torch.ones(max(size // 4, 1))
    return 2 * source.nbytes / _least(lambda: torch.neg(source))


def _draws(count: int) -> float:
    mask = torch.empty(count)
    with torch.random.fork_rng(devices=[]):
        return count / _least(lambda: mask.bernoulli_(0.5))


def _torchs(x: torch.Tensor) -> torch.Tensor:
    return x * 2.0


def _own(x: torch.Tensor) -> torch.Tensor:
    return layer_norm(x, (8,))


_CALLS = 50


def _call(operator: Callable[[torch.Tensor], torch.Tensor]) -> tuple[float, float]:
    """Seconds of one call on eight numbers, forward and backward, in a chain of many."""

    def chain() -> torch.Tensor:
        x = torch.ones(1, 8, requires_grad=True)
        for _ in range(_CALLS):
            x = operator(x)
        return x

    ones = torch.ones(1, 8)
    with torch.enable_grad(), kernels_at_any_size():
        forward = _least(chain)
        both = _least(lambda: chain().backward(ones))
    return forward / _CALLS, max(both - forward, 0.0) / _CALLS


def _least(function: Callable[[], object]) -> float:
    return min(_times(function))


def _typical(function: Callable[[], object]) -> float:
    return statistics.median(_times(function))


def _times(function: Callable[[], object]) -> list[float]:
    """Seconds of ten calls, of fewer where they take long; the first, which warms up, apart."""
    function()
    seconds: list[float] = []
    while len(seconds) < 10 and (len(seconds) < 3 or sum(seconds) < 1.0):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return seconds
