"""The time to expect: what a model does, at the speeds that this machine has been seen to reach.

An operator takes what its products take at the speed of products of their size, or what its traffic takes at the speed
of traffic of its size, whichever is longer, and what any call takes, however small. torch's operators write fresh
memory, nacre's own write memory that is used again; both are measured. A row's time is the sum over its operators.
"""

import hashlib
import json
import math
import os
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
        products: for each dtype the FLOPs a second of a square product, by its rows.
        kept: bytes a second read and written by a copy into memory that is there, by the bytes copied.
        fresh: the same into memory that is taken for each copy.
        draws: random numbers a second, as torch draws a mask.
        call: seconds of the smallest call of an operator of torch, autograd's part included: forward and backward.
        own_call: the same of one of nacre's.
        warnings: what speaks against trusting them.
    """

    products: Mapping[str, Curve]
    kept: Curve
    fresh: Curve
    draws: float
    call: tuple[float, float]
    own_call: tuple[float, float]
    warnings: tuple[str, ...] = ()

    def seconds(self, work: Work, backward: bool) -> float:
        """The time to expect for one call of an operator."""
        curve = self.products.get(work.dtype) or next(iter(self.products.values()))
        side = max(round(work.product ** (1 / 3)), 1)
        products = work.flops / at(curve, side) if work.flops else 0.0
        memory = self.kept if work.own else self.fresh
        traffic = work.bytes / at(memory, max(work.bytes // 2, 1)) if work.bytes else 0.0
        return max(products, traffic, work.random / self.draws) + (self.own_call if work.own else self.call)[backward]

    def ceilings(self, dtype: str) -> Ceilings:
        """The best that was measured: products of a dtype, and copies too large for the caches."""
        curve = self.products.get(dtype) or next(iter(self.products.values()))
        return Ceilings(max(curve.values()), self.kept[max(self.kept)])

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
                {str(dtype): _curve(curve) for dtype, curve in values["products"].items()},
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
        own = sum(count * speeds.seconds(work, False) for work, count in row.forward_work.items())
        own += sum(count * speeds.seconds(work, True) for work, count in row.backward_work.items())
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
    if known is not None and all(dtype in known.products for dtype in dtypes):
        return known
    doubts = tuple(warnings(other_load()))
    products = {} if known is None else dict(known.products)
    for dtype in dtypes:
        if dtype not in products:
            products[dtype] = {side: matrix_peak(DTYPES[dtype], side) for side in SIDES}
    if known is not None:
        speeds = replace(known, products=products)
    else:
        kept = {size: copy_bandwidth(size) for size in SIZES}
        fresh = {size: _fresh(size) for size in SIZES}
        speeds = Speeds(products, kept, fresh, _draws(2**20), _call(_torchs), _call(_own))
    if doubts:
        return replace(speeds, warnings=doubts)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_text(json.dumps(speeds.as_json()), encoding="utf-8")
    except OSError:
        pass  # nowhere to keep them: they are measured again the next time
    return speeds


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


def _least(function: Callable[[], object], repeats: int = 10) -> float:
    function()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
