"""Measures what the predictions need of this machine, once, and keeps it in a file."""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from nacre.applications.files import replacing
from nacre.core.choice import kernels_at_any_size
from nacre.layers.layer_norm import layer_norm
from nacre.tools.bench.ceilings import copy_bandwidth, matrix_peak
from nacre.tools.bench.machine import describe, other_load, warnings
from nacre.tools.bench.selection import DTYPES
from nacre.tools.cost.grid import Grid
from nacre.tools.cost.probes import least
from nacre.tools.cost.speed import Calls, Speeds
from nacre.tools.cost.stage import apart
from nacre.tools.cost.tables import PROBES

SIDE = 2048
"""Rows and columns of the product whose speed is the best there is."""

SIZES = (2**19, 2**20, 2**21, 2**23, 2**25, 2**27, 2**28)
"""Bytes that the copies go through, read and written together."""

FRESH = 2**26
"""Bytes of the block that is taken from the system."""


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


def machine_speeds(needed: Mapping[str, set[str]]) -> Speeds:
    """This machine's speeds, from the file or measured now; a damaged file is measured anew.

    What was measured while other processes worked is not kept.

    Args:
        needed: the kinds of operators that are asked for, by dtype.
    """
    path = cache_file()
    try:
        known = Speeds.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        known = None
    if known is not None and not any(kinds - set(known.grids.get(dtype, ())) for dtype, kinds in needed.items()):
        return known
    doubts = tuple(warnings(other_load()))
    with apart(), torch.inference_mode(False):
        speeds = _measured(known, needed)
    if doubts:
        return replace(speeds, warnings=doubts)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_text(json.dumps(speeds.as_json()), encoding="utf-8")
    except OSError:
        pass  # nowhere to keep them: they are measured again the next time
    return speeds


def _measured(known: Speeds | None, needed: Mapping[str, set[str]]) -> Speeds:
    """What is known, with what is missing."""
    from tqdm import tqdm

    grids: dict[str, dict[str, Grid | None]] = (
        {} if known is None else {one: dict(of) for one, of in known.grids.items()}
    )
    best = {} if known is None else dict(known.best)
    missing = [(dtype, kind) for dtype, kinds in needed.items() for kind in sorted(kinds - set(grids.get(dtype, ())))]
    with tqdm(total=len(missing) + 1, desc="measuring this machine", unit="kind", leave=False, disable=None) as bar:
        copies = known.copies if known else {size: copy_bandwidth(size // 2) for size in SIZES}
        fresh, calls = (known.fresh, known.calls) if known else (_fresh(), _calls())
        bar.update()
        for dtype, kind in missing:
            bar.set_postfix_str(kind)
            of = grids.setdefault(dtype, {})
            if dtype not in best:
                best[dtype] = matrix_peak(DTYPES[dtype], SIDE)
            if kind not in of:
                of.update({**dict.fromkeys(PROBES[kind].kinds), **PROBES[kind].grids(DTYPES[dtype])})
            bar.update()
    return Speeds(best, grids, copies, fresh, calls)


def _fresh() -> float:
    """Seconds of a byte in memory that is new, more than in memory that is there."""
    old = torch.empty(FRESH, dtype=torch.uint8)
    kept = least(lambda: old.fill_(1))
    return max(least(lambda: torch.empty(FRESH, dtype=torch.uint8).fill_(1)) - kept, 1e-3 * kept) / FRESH


_CHAIN = 50


def _calls() -> Calls:
    """What calls take on eight numbers, in chains of many."""
    x, wish = torch.ones(1, 8), torch.ones(1, 8, requires_grad=True)
    identity = nn.Identity()
    with torch.no_grad():
        multiplied, normalised = torch.ops.aten.mul.Tensor, torch.ops.nacre.layer_norm.default
        torchs = _each(lambda one: multiplied(one, x), x)
        own = _each(lambda one: normalised(one, [8], None, None, 1e-5)[0], x)
        empty = _each(lambda one: one, x)
        module = _each(identity, x) - empty
    with torch.enable_grad(), kernels_at_any_size():
        mul = _forward_and_backward(lambda one: one * x, wish)
        norm = _forward_and_backward(lambda one: layer_norm(one, (8,)), wish)
        turn = _forward_and_backward(lambda one: one.t(), wish)
        start = least(lambda: wish.t().backward(torch.ones(8, 1)))
    return Calls(
        module=max(module, 0.0),
        torch=(max(mul[0] - torchs, 0.0), max(mul[1] - torchs, 0.0)),
        own=(max(norm[0] - own, 0.0), max(norm[1] - own, 0.0)),
        view=turn,
        start=max(start - sum(turn), 0.0),
    )


def _each(function: Callable[[Tensor], Tensor], x: Tensor) -> float:
    def chain() -> Tensor:
        one = x
        for _ in range(_CHAIN):
            one = function(one)
        return one

    return least(chain) / _CHAIN


def _forward_and_backward(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[float, float]:
    """Seconds of a call in a chain of calls."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(12):
        begun = time.perf_counter()
        one = x
        for _ in range(_CHAIN):
            one = function(one)
        middle = time.perf_counter()
        one.backward(torch.ones_like(one))
        times[0].append(middle - begun)
        times[1].append(time.perf_counter() - middle)
    forward, backward = (min(one) / _CHAIN for one in times)
    return forward, backward
