"""The GPT trained with torch.nn's layers and with nacre's: the time of a step and of all, and whether the losses agree.

Both start from the same weights, see the same data in the same order and have the same optimizer; their steps take
turns in one process. Without dropout the two curves of the loss must be one, but for rounding: such a run comes before
each run with dropout, in which the two draw other numbers.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from nacre.applications import build
from nacre.applications.application import Application
from nacre.tools.bench.children import environment, run_job
from nacre.tools.bench.results import NACRE, TORCH
from nacre.tools.bench.study import Options, Panel, Study, Table
from nacre.tools.convert import convert
from nacre.tools.quantities import milliseconds

AGREEMENT = 1e-3
"""Largest relative difference between two loss curves of one run. Both start from the same weights and see the same
data in the same order; what is left is float32 rounding, which training amplifies from step to step."""

STEPS = 200

RUNS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("reference recipe", {}),
    ("width 512", {"width": 512, "heads": 8, "block": 256}),
    ("width 512", {"width": 512, "heads": 8, "block": 256, "dropout": 0.1}),
)
"""Names and sizes of the models that are trained; a run with dropout stands after the same without."""


@dataclass(frozen=True)
class TrainingRow:
    """A training with the layers of both sides.

    Args:
        model: its name.
        sizes: those that are not the application's own.
        seconds: of each step, by side.
        losses: of each step, by side.
    """

    model: str
    sizes: Mapping[str, Any]
    seconds: Mapping[str, Sequence[float]]
    losses: Mapping[str, Sequence[float]]

    @property
    def dropout(self) -> float:
        """Share of values dropped."""
        return float(self.sizes.get("dropout", 0.0))

    @property
    def name(self) -> str:
        """Model and dropout."""
        return f"{self.model}, dropout {self.dropout:g}"

    @property
    def difference(self) -> float | None:
        """The largest relative difference between the losses of a step; None where dropout makes them differ."""
        return None if self.dropout else largest_difference(self.losses[TORCH], self.losses[NACRE])

    @property
    def wrong(self) -> bool:
        """Whether the two curves are not one though they must be."""
        return self.difference is not None and not self.difference <= AGREEMENT

    @property
    def share(self) -> float:
        """nacre's part of torch.nn's time, over all steps."""
        return sum(self.seconds[NACRE]) / sum(self.seconds[TORCH])

    def as_json(self) -> dict[str, Any]:
        """All fields, with what follows from them."""
        return {**asdict(self), "dropout": self.dropout, "difference": self.difference, "share": self.share}


def largest_difference(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """The largest relative difference between two numbers of one place; NaN where either is.

    Example:
        >>> largest_difference([1.0, 2.0], [1.0, 2.5])
        0.25
    """
    differences = [abs(one - other) / abs(other) for one, other in zip(ours, theirs, strict=True)]
    return max(differences, key=lambda value: (value != value, value))


def run(options: Options, on_row: Callable[[TrainingRow], object]) -> list[TrainingRow]:
    """Trains every model, each in a fresh process; one whose losses disagree without dropout is not timed with it."""
    rows: list[TrainingRow] = []
    data = None if options.data is None else str(options.data)
    for model, sizes in RUNS:
        if any(row.wrong for row in rows if row.model == model):
            continue
        job = {"job": "training", "sizes": sizes, "steps": options.steps or STEPS, "data": data}
        (one,) = run_job(job, environment("default", options.threads))
        rows.append(TrainingRow(model, sizes, **one))
        on_row(rows[-1])
    return rows


def found(job: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A training by both sides, in the process that measures."""
    trainings = {}
    for side in (TORCH, NACRE):
        application = build("gpt", data=job["data"], **job["sizes"])
        if side == TORCH:
            convert(application.model, to="torch")
        trainings[side] = Training(application)
    seconds: dict[str, list[float]] = {side: [] for side in trainings}
    losses: dict[str, list[float]] = {side: [] for side in trainings}
    for step in range(job["steps"]):
        for side in (TORCH, NACRE) if step % 2 else (NACRE, TORCH):
            start = time.perf_counter()
            losses[side].append(trainings[side].step(step))
            seconds[side].append(time.perf_counter() - start)
    yield {"seconds": seconds, "losses": losses}


class Training:
    """The training of an application, one step at a time.

    Args:
        application: model, data and recipe.
    """

    def __init__(self, application: Application) -> None:
        self.application = application
        self.model = application.model.train()
        self.optimizer = application.recipe.optimizer(self.model)

    def step(self, number: int) -> float:
        """Makes step ``number`` (from 0) of the recipe; returns its loss."""
        application, recipe = self.application, self.application.recipe
        inputs, targets = application.data.training_batch(number, recipe.batch_size, application.seed)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate_at(number, application.steps)
        self.optimizer.zero_grad()
        loss = self.model.get_submodule("criterion")(self.model(inputs).flatten(0, -2), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), recipe.gradient_clip)
        self.optimizer.step()
        return float(loss.item())


HEADINGS = (
    *("GPT", "dropout", "steps", "a step of torch.nn", "of nacre", "all steps of torch.nn", "of nacre"),
    *("nacre / torch.nn", "last loss of torch.nn", "of nacre", "largest difference"),
)


def tables(rows: Sequence[TrainingRow]) -> list[Table]:
    """One table; a curve that disagrees has no times."""
    notes = [
        f"{row.name}: WRONG: the losses differ by up to {row.difference:.2g} of their value, more than {AGREEMENT:g}"
        for row in rows
        if row.wrong
    ]
    return [Table("Trainings, step by step in turn", HEADINGS, (0,), [_cells(row) for row in rows], notes)]


def _cells(row: TrainingRow) -> list[str]:
    steps = [milliseconds(statistics.median(row.seconds[side])) for side in (TORCH, NACRE)]
    totals = [f"{sum(row.seconds[side]):.1f} s" for side in (TORCH, NACRE)]
    times = ["WRONG"] * 5 if row.wrong else [*steps, *totals, f"{row.share:.2f}"]
    losses = [f"{row.losses[side][-1]:.4f}" for side in (TORCH, NACRE)]
    difference = "" if row.difference is None else f"{row.difference:.1e}"
    return [row.model, f"{row.dropout:g}", f"{len(row.losses[TORCH])}", *times, *losses, difference]


def panels(rows: Sequence[TrainingRow]) -> list[Panel]:
    """The curves of the loss."""
    return [
        Panel(
            row.name, "step", "loss",
            {side: (range(1, len(losses) + 1), losses) for side, losses in row.losses.items()},
        )
        for row in rows
    ]  # fmt: skip


STUDY = Study(
    name="training",
    help=f"{STEPS} steps (or --steps) of the GPT, small and 512 wide, with torch.nn's layers and with nacre's",
    rows=len(RUNS),
    run=run,
    tables=tables,
    panels=panels,
)
