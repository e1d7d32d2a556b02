"""The time to expect: what a model does, at the speeds that this machine has been seen to reach.

A call of an operator takes the sum of

- what calls of its kind took at sizes around its own, on tensors near the processor (:mod:`.tables`, :mod:`.grid`);
- for each tensor that has gone farther away than there, its bytes, times what a byte costs from so far (measured as
  copies of growing size) less what it costs from near (:mod:`.distances`);
- for the memory which the system has to find anew, its bytes, times what a fresh byte costs;
- what autograd and Python add to a call, forward or backward.

A call of a module adds what Python needs for it, a backward what it needs to begin. A row's time is the sum over its
operators and over the rows within it.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from nacre.tools.bench.machine import describe
from nacre.tools.bench.results import Ceilings
from nacre.tools.bench.selection import DTYPES
from nacre.tools.cost.grid import Grid, positive
from nacre.tools.cost.kinds import VIEW
from nacre.tools.cost.operators import Work
from nacre.tools.cost.report import CostReport
from nacre.tools.cost.tables import COPY, POINTWISE, PROBES, SAME

Curve = dict[int, float]
"""A speed for each of some sizes; between them it goes straight on logarithmic scales."""


@dataclass(frozen=True)
class Calls:
    """Seconds that a call takes beside its work, forward and backward.

    Args:
        module: of a module, in Python.
        torch: of an operator of torch, autograd's part.
        own: of one of nacre's.
        view: of an operator that makes a view, altogether.
        start: of a backward, before its first operator.
    """

    module: float = 0.0
    torch: tuple[float, float] = (0.0, 0.0)
    own: tuple[float, float] = (0.0, 0.0)
    view: tuple[float, float] = (0.0, 0.0)
    start: float = 0.0


@dataclass(frozen=True)
class Speeds:
    """What this machine can do, measured.

    Args:
        best: for each dtype the FLOPs a second of the best product there is.
        grids: for each dtype and kind of operator its times; None for a kind that does not run here.
        copies: bytes a second of a copy, read and written, by the bytes that it goes through.
        fresh: seconds that a byte of fresh memory costs.
        calls: seconds that calls take.
        warnings: what speaks against trusting them.
    """

    best: Mapping[str, float]
    grids: Mapping[str, Mapping[str, Grid | None]]
    copies: Curve
    fresh: float
    calls: Calls
    warnings: tuple[str, ...] = ()

    def seconds(self, work: Work, backward: bool) -> float:
        """The time to expect for one call of an operator.

        Args:
            work: what it does.
            backward: whether autograd calls it in the backward.
        """
        fresh = work.fresh * self.fresh
        if work.kind == VIEW:
            return self.calls.view[backward] + fresh
        grids = self.grids[work.dtype if work.dtype in self.grids else next(iter(self.grids))]
        kind = kind_of_table(work)
        table = grids[kind]
        if table is None or kind in (COPY, POINTWISE):
            copy = table or grids[COPY]
            near = copy.at((work.bytes,), work.bytes) if copy else 0.0
        else:
            near = table.at(work.sizes, work.flops or work.bytes)
        cost = 1 / at(self.copies, max(work.bytes, 1))
        way = sum(size * max(1 / at(self.copies, distance) - cost, 0.0) for distance, size in work.distances)
        call = self.calls.own if work.own else self.calls.torch
        return near + way + fresh + call[backward]

    def ceilings(self, dtype: str) -> Ceilings:
        """The best that was measured: products of a dtype, and copies too large for the caches."""
        return Ceilings(self.best.get(dtype) or next(iter(self.best.values())), self.copies[max(self.copies)])

    def as_json(self) -> dict[str, Any]:
        """Plain values, for a file."""
        grids = {
            dtype: {kind: grid and grid.as_json() for kind, grid in of.items()} for dtype, of in self.grids.items()
        }
        copies = {str(size): speed for size, speed in self.copies.items()}
        calls = asdict(self.calls)
        return {"best": dict(self.best), "grids": grids, "copies": copies, "fresh": self.fresh, "calls": calls}

    @staticmethod
    def from_json(values: Any) -> "Speeds":
        """Speeds from what ``as_json`` made of them.

        Raises:
            ValueError: they are none.
        """
        try:
            grids = {
                str(dtype): {str(kind): None if grid is None else Grid.from_json(grid) for kind, grid in of.items()}
                for dtype, of in values["grids"].items()
            }
            best = {str(dtype): positive(values["best"][dtype]) for dtype in grids}
            copies = {int(size): positive(speed) for size, speed in values["copies"].items()}
            given = values["calls"]
            module, start = _pair((given["module"], given["start"]))
            calls = Calls(module, _pair(given["torch"]), _pair(given["own"]), _pair(given["view"]), start)
            fresh = positive(values["fresh"])
        except (AttributeError, KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"these are no speeds of a machine: {error}") from error
        for dtype, of in grids.items():
            for kind, grid in of.items():
                if kind in PROBES and grid is not None and grid.axes != PROBES[kind].axes:
                    raise ValueError(f"the times of {kind} in {dtype} are of other sizes than are measured now")
        if not copies:
            raise ValueError("a speed is known for some size")
        return Speeds(best, grids, copies, fresh, calls)


def kind_of_table(work: Work) -> str:
    """The kind whose times stand for a call: its own, that of a like one, or that of what any call of its sort does."""
    kind = SAME.get(work.kind, work.kind)
    if kind in PROBES:
        return kind
    return POINTWISE if work.pointwise else COPY


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
    if speeds is None:
        from nacre.tools.cost.ceilings import machine_speeds

        speeds = machine_speeds(needed(report))
    report.warnings = speeds.warnings
    report.machine, report.ceilings = describe(), speeds.ceilings(_dtypes(report)[0])
    for place in reversed(range(len(report.rows))):  # what lies within comes after
        row = report.rows[place]
        within = [report.rows[child] for child in report.children(place)]
        own = speeds.calls.module + sum(count * speeds.seconds(work, False) for work, count in row.forward_work.items())
        own += sum(count * speeds.seconds(work, True) for work, count in row.backward_work.items())
        if not place and any(one.backward_work for one in report.rows):
            own += speeds.calls.start
        row.predicted_seconds = own + sum(child.predicted_seconds or 0.0 for child in within)
        least = report.ceilings.seconds(row.own.flops, row.own.bytes)
        least += report.ceilings.seconds(row.own.backward_flops, row.own.backward_bytes)
        row.limit_seconds = least + sum(child.limit_seconds or 0.0 for child in within)


def needed(report: CostReport) -> dict[str, set[str]]:
    """The kinds of operators in a bill whose times are asked for, by dtype."""
    main = _dtypes(report)[0]
    kinds: dict[str, set[str]] = {main: {COPY}}
    for row in report.rows:
        for work in (*row.forward_work, *row.backward_work):
            if work.kind != VIEW:
                kinds.setdefault(work.dtype if work.dtype in DTYPES else main, set()).add(kind_of_table(work))
    return kinds


def _dtypes(report: CostReport) -> list[str]:
    """The dtypes of the model's products, the one with most FLOPs first; float32 where there are none."""
    flops: dict[str, int] = {}
    for row in report.rows:
        for works in (row.forward_work, row.backward_work):
            for work, count in works.items():
                if work.flops and work.dtype in DTYPES:
                    flops[work.dtype] = flops.get(work.dtype, 0) + work.flops * count
    return sorted(flops, key=lambda dtype: -flops[dtype]) or ["float32"]
