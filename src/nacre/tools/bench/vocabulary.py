"""The head of a language model and its loss: time and memory of a step, for torch.nn's two layers, its one and nacre's.

A step is forward and backward. Every side returns the same gradients; what it needs beside them is its own affair.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import nacre
from nacre.core.spec import Integers, Normal
from nacre.tools.bench.agreement import disagreement
from nacre.tools.bench.children import environment, run_job
from nacre.tools.bench.comparing import apart
from nacre.tools.bench.measuring import measure
from nacre.tools.bench.memory import peak_bytes
from nacre.tools.bench.results import NACRE
from nacre.tools.bench.selection import Settings
from nacre.tools.bench.sides import Step, in_float64
from nacre.tools.bench.study import Options, Study, Table
from nacre.tools.quantities import mebibytes, milliseconds

FEATURES, CLASSES, TOKENS = 768, 50_257, 1024  # GPT-2's
SEPARATE, FUSED = "torch.nn, Linear and CrossEntropyLoss", "torch.nn.LinearCrossEntropyLoss"
_WARMING = 2  # tokens of a first call, which loads what a process needs but once


class Separate(nn.Module):
    """A linear map and the cross entropy of what it gives."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, classes, bias=False)
        self.loss = nn.CrossEntropyLoss()

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = self.loss(self.linear(input), target)
        return loss


HEADS: dict[str, Callable[[int, int], nn.Module]] = {SEPARATE: Separate, NACRE: nacre.LinearCrossEntropyLoss}
"""How each side is built, by its name."""

if hasattr(nn, "LinearCrossEntropyLoss"):  # torch 2.13 and later
    HEADS = {SEPARATE: Separate, FUSED: nn.LinearCrossEntropyLoss, NACRE: nacre.LinearCrossEntropyLoss}


@dataclass(frozen=True)
class HeadRow:
    """One way to compute the loss of a vocabulary.

    Args:
        side: which.
        seconds: of a step; None where its results were wrong.
        peak: bytes, the most beyond input and parameters; None where the system does not tell.
        gradients: bytes of the gradients of input and parameters, which every side returns.
        problem: what is wrong with its results.
    """

    side: str
    seconds: float | None
    peak: int | None
    gradients: int
    problem: str = ""

    @property
    def name(self) -> str:
        """The side."""
        return self.side

    @property
    def wrong(self) -> bool:
        """Whether its results were."""
        return bool(self.problem)

    @property
    def extra(self) -> int | None:
        """The most that a step needs beside the gradients, in bytes."""
        return None if self.peak is None else self.peak - self.gradients

    def as_json(self) -> dict[str, Any]:
        """All fields, with what follows from them."""
        return {**asdict(self), "extra": self.extra}


def run(options: Options, on_row: Callable[[HeadRow], object]) -> list[HeadRow]:
    """Checks every side, times them by turns, then sees what each needs in a process of its own."""
    job = {"job": "vocabulary", "rounds": options.rounds, "seconds": options.seconds or Settings.seconds}
    rows = []
    for one in run_job({**job, "sizes": (FEATURES, CLASSES, TOKENS)}, environment("default", options.threads)):
        rows.append(HeadRow(**one))
        on_row(rows[-1])
    return rows


def found(job: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows, in the process that measures."""
    problems = apart(problems_of, *job["sizes"])
    right = [side for side in HEADS if not problems[side]]
    times = apart(times_of, right, job["rounds"], job["seconds"], *job["sizes"])
    for side in HEADS:
        peak, gradients = apart(memory_of, side, *job["sizes"])
        yield asdict(HeadRow(side, times.get(side), peak, gradients, problems[side]))


def step_of(side: str, features: int, classes: int, tokens: int) -> Step:
    """A step of a side, with the same weights and inputs for each."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    inputs = (Normal((tokens, features)).make(torch.float32, generator),
              Integers((tokens,), classes).make(torch.float32, generator))  # fmt: skip
    return Step(HEADS[side](features, classes), inputs, {})


def problems_of(*sizes: int) -> dict[str, str]:
    """What is wrong with the results of each side, empty where nothing is."""
    torchs = step_of(SEPARATE, *sizes)
    inputs, keywords = in_float64(torchs.inputs, torchs.keywords)
    theirs = torchs.results()
    expected = Step(copy.deepcopy(torchs.module).double(), inputs, keywords).results()
    return {side: disagreement(step_of(side, *sizes).results(), theirs, expected, torch.float32) for side in HEADS}


def times_of(sides: Sequence[str], rounds: int, seconds: float, *sizes: int) -> dict[str, float | None]:
    """The median seconds of a step of each side."""
    steps = {side: step_of(side, *sizes) for side in sides}
    return {side: timed.seconds for side, timed in measure(steps, rounds, seconds).items()}


def memory_of(side: str, features: int, classes: int, tokens: int) -> tuple[int | None, int]:
    """The peak of a step of a side, in a process that has made no such step yet, and the bytes of its gradients."""
    step_of(side, features, _WARMING, _WARMING)()
    step = step_of(side, features, classes, tokens)
    peak = peak_bytes(step)
    return peak, sum(leaf.grad.nbytes for leaf in step.leaves.values() if leaf.grad is not None)


HEADINGS = ("loss of a vocabulary", "step", "peak memory", "of it gradients", "beside them", "of torch.nn's two layers")


def tables(rows: Sequence[HeadRow]) -> list[Table]:
    """One table."""
    separate = next((row.extra for row in rows if row.side == SEPARATE), None)
    cells = [
        [
            row.side,
            "WRONG" if row.seconds is None else milliseconds(row.seconds),
            *map(mebibytes, (row.peak, row.gradients, row.extra)),
            "" if row.extra is None or not separate else f"1/{separate / max(row.extra, 1):.1f}",
        ]
        for row in rows
    ]
    notes = [f"{row.side}: WRONG: {row.problem}" for row in rows if row.problem]
    title = f"A step of the head {FEATURES} -> {CLASSES:,} and its loss, {TOKENS:,} tokens"
    return [Table(title, HEADINGS, (0,), cells, notes)]


STUDY = Study(
    name="vocabulary",
    help="time and memory of a language model's head and its loss: torch.nn's two layers, its one, nacre's",
    rows=len(HEADS),
    run=run,
    tables=tables,
)
