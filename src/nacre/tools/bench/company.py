"""Quiet against company: a training step alone on the machine, and beside one busy process of somebody else.

The neighbour stands in a session of its own, as another login, container or service does: the scheduler then gives it
a share of its own, and takes whole time slices from a thread that others wait for.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

import nacre.threads
from nacre.tools.bench.children import environment, run_job
from nacre.tools.bench.machine import CHANGING
from nacre.tools.bench.results import NACRE, TORCH
from nacre.tools.bench.study import Options, Study, Table
from nacre.tools.convert import convert
from nacre.tools.quantities import milliseconds

_NEIGHBOUR = """
import os, sys
os.nice(15)
while os.getppid() == int(sys.argv[1]):  # it does not outlive who started it
    for _ in range(1_000_000):
        pass
"""

_LEAST_STEPS = 5


@dataclass(frozen=True)
class Setting:
    """One way to set a process up.

    Args:
        name: as it is shown.
        environment: variables that are set before torch loads.
        share: whether :func:`nacre.threads.share` is called first.
    """

    name: str
    environment: Mapping[str, str] = field(default_factory=dict)
    share: bool = False


SETTINGS = (
    Setting("torch's defaults"),
    Setting("nacre.threads.share()", share=True),
    Setting("OMP_WAIT_POLICY=passive", {"OMP_WAIT_POLICY": "passive"}),
)


@dataclass(frozen=True)
class CompanyRow:
    """A workload's step, alone and in company.

    Args:
        workload: its name.
        side: whose layers.
        setting: how the process was set up.
        quiet: median seconds of a step alone.
        company: the same beside a busy neighbour.
    """

    workload: str
    side: str
    setting: str
    quiet: float
    company: float

    wrong = False  # it has no result but its time

    @property
    def name(self) -> str:
        """Workload and side."""
        return f"{self.workload}, {self.side}"

    @property
    def slowdown(self) -> float:
        """How many times as long a step takes in company."""
        return self.company / self.quiet

    def as_json(self) -> dict[str, Any]:
        """All fields, with what follows from them."""
        return {**asdict(self), "slowdown": self.slowdown}


def company(
    seconds: float = 3.0,
    threads: int | None = None,
    settings: tuple[Setting, ...] = SETTINGS,
    on_row: Callable[[CompanyRow], object] = lambda row: None,
) -> list[CompanyRow]:
    """Measures every workload by torch.nn and by nacre, each time in a fresh process, quiet and in company.

    Args:
        seconds: of steps in each process. Default: 3.
        threads: of torch. Default: torch's own choice.
        settings: how the processes are set up.
        on_row: called with every row as soon as it is there.
    """
    rows = []
    for workload in WORKLOADS:
        for setting in settings:
            for side in (TORCH, NACRE):
                job = {"job": "company", "workload": workload, "layers": side, "seconds": seconds}
                job["share"] = setting.share
                quiet = _seconds(job, setting, threads)
                with neighbour():
                    beside = _seconds(job, setting, threads)
                rows.append(CompanyRow(workload, side, setting.name, quiet, beside))
                on_row(rows[-1])
    return rows


@contextmanager
def neighbour() -> Iterator[int]:
    """A busy process of another scheduling group, by its process id; it ends with the block, or with this process."""
    command = [sys.executable, "-c", _NEIGHBOUR, str(os.getpid())]
    process = subprocess.Popen(command, start_new_session=True, stdin=subprocess.DEVNULL)
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


def found(job: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The time of a step, in the process that measures."""
    yield {"seconds": seconds_of(job["workload"], job["layers"], job["seconds"], job["share"])}


def seconds_of(workload: str, layers: str, seconds: float, share: bool = False) -> float:
    """The median time of a step in this process."""
    if share:
        nacre.threads.share()
    step = WORKLOADS[workload](layers)
    for _ in range(3):
        step()
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while len(taken) < _LEAST_STEPS or time.perf_counter() < end:
        start = time.perf_counter()
        step()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _seconds(job: Mapping[str, Any], setting: Setting, threads: int | None) -> float:
    # what the caller has set itself would stand in for torch's defaults
    given = environment("default", threads, without=CHANGING)
    (found,) = run_job(job, {**given, **setting.environment})
    return float(found["seconds"])


def _training_step(model: nn.Module, layers: str, *shape: int) -> Callable[[], None]:
    """Forward, backward and, where there are parameters, AdamW's step of a model on random numbers."""
    torch.manual_seed(0)
    if layers == NACRE:
        convert(model)
    x, cotangent = torch.randn(2, *shape)
    x.requires_grad_()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters) if parameters else None

    def step() -> None:
        x.grad = None
        if optimizer is not None:
            optimizer.zero_grad()
        model(x).backward(cotangent)
        if optimizer is not None:
            optimizer.step()

    return step


WORKLOADS: dict[str, Callable[[str], Callable[[], None]]] = {
    "encoder layer, 12x64 tokens of 128": lambda layers: _training_step(
        nn.TransformerEncoderLayer(128, 4, 512, dropout=0.1, batch_first=True), layers, 12, 64, 128
    ),
    "layer_norm, 8x197x768": lambda layers: _training_step(nn.LayerNorm(768), layers, 8, 197, 768),
    "gelu, 8x197x768": lambda layers: _training_step(nn.GELU(), layers, 8, 197, 768),
}
"""What is measured, by its name: whose layers it has is said when it is built."""


def run(options: Options, on_row: Callable[[CompanyRow], object]) -> list[CompanyRow]:
    """Measures all of it."""
    return company(3.0 if options.seconds is None else options.seconds, options.threads, on_row=on_row)


HEADINGS = ("step", "set before torch loads", "layers", "quiet", "in company", "times as long")


def tables(rows: Sequence[CompanyRow]) -> list[Table]:
    """One table."""
    cells = [
        [row.workload, row.setting, row.side, milliseconds(row.quiet), milliseconds(row.company), f"{row.slowdown:.1f}"]
        for row in rows
    ]
    return [Table("A training step, alone and beside one busy process", HEADINGS, (0, 1, 2), cells)]


STUDY = Study(
    name="company",
    help="training steps alone and beside one busy process, which is started and ended here",
    rows=len(WORKLOADS) * len(SETTINGS) * 2,
    run=run,
    tables=tables,
)
