"""Attention against the number of tokens n: time and memory by torch.nn and by nacre, and the powers that they follow.

Every token attends to every other: the time grows with n^2 as soon as the projections, which grow with n, are little
beside it. What is kept for the backward need not: the matrix of n x n weights can be made again.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nacre.core.spec import Case, Normal, Same
from nacre.layers import LAYERS
from nacre.tools.bench.children import environment, run_job
from nacre.tools.bench.comparing import apart, measured
from nacre.tools.bench.memory import peak_bytes, saved_bytes
from nacre.tools.bench.results import NACRE, TORCH, Ceilings, Row
from nacre.tools.bench.run import measured_ceilings
from nacre.tools.bench.selection import DTYPES, Settings
from nacre.tools.bench.sides import Step, build
from nacre.tools.bench.study import Options, Panel, Study, Table
from nacre.tools.quantities import mebibytes, milliseconds

TOKENS = (256, 512, 1024, 2048, 4096, 8192)
DROPOUTS = (0.0, 0.1)

_SIZES = {"embed_dim": 128, "num_heads": 2, "batch_first": True}  # heads of 64 features, as most models have
_WARMING = 32  # tokens of a first call, which loads what a process needs but once
_COMPARED = (TORCH, NACRE)


@dataclass(frozen=True)
class Memory:
    """What one side needs for a step, in bytes.

    Args:
        saved: kept for the backward, the input included.
        peak: the most beyond input and parameters; None where the system does not tell.
    """

    saved: int
    peak: int | None


@dataclass(frozen=True)
class GrowthRow:
    """Attention at one number of tokens.

    Args:
        tokens: n.
        dropout: share of the weights dropped.
        times: of a step, forward and backward, with their limit.
        memory: of each side, by its name.
    """

    tokens: int
    dropout: float
    times: Row
    memory: Mapping[str, Memory]

    @property
    def name(self) -> str:
        """Tokens and dropout."""
        return f"{self.tokens} tokens, dropout {self.dropout:g}"

    @property
    def wrong(self) -> bool:
        """Whether a side was refused for its result."""
        return self.times.wrong

    def seconds(self, side: str) -> float | None:
        """A side's step; None where it was not timed."""
        return self.times.sides[side].seconds if side in self.times.sides else None

    def as_json(self) -> dict[str, Any]:
        """All fields, with what follows from them."""
        return {**asdict(self), "times": self.times.as_json()}


def attention(tokens: int, dropout: float) -> Case:
    """Self-attention of one sequence, without a mask and without returning the weights."""
    inputs = (Normal((1, tokens, _SIZES["embed_dim"])), Same(0), Same(0))
    given = {**_SIZES, "dropout": dropout}
    return Case(f"{tokens} tokens", given, inputs, {"need_weights": False}, random=dropout > 0)


def run(options: Options, on_row: Callable[[GrowthRow], object]) -> list[GrowthRow]:
    """Measures every number of tokens without and with dropout, each in a forked process of its own."""
    settings = Settings(
        compile=False, threads=options.threads, rounds=options.rounds, seconds=options.seconds or Settings.seconds
    )
    job = {"job": "growth", "settings": asdict(settings), "ceilings": asdict(measured_ceilings(settings))}
    rows = []
    for one in run_job({**job, "tokens": TOKENS, "dropouts": DROPOUTS}, environment("default", options.threads)):
        memory = {side: Memory(**values) for side, values in one["memory"].items()}
        rows.append(GrowthRow(**{**one, "times": Row.from_json(one["times"]), "memory": memory}))
        on_row(rows[-1])
    return rows


def found(job: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows, in the process that measures."""
    settings = Settings(**{**job["settings"], "names": ()})
    for dropout in job["dropouts"]:
        for tokens in job["tokens"]:
            case = attention(tokens, dropout)
            times = measured(LAYERS["attention"], case, settings, "default", Ceilings(**job["ceilings"]))
            memory = {side: apart(memory_of, tokens, dropout, side) for side in _COMPARED}
            yield asdict(GrowthRow(tokens, dropout, times, memory))


def memory_of(tokens: int, dropout: float, side: str) -> Memory:
    """What a step of one side needs, in a process that has made no such step yet."""
    case = attention(tokens, dropout)
    layers = dict(zip((NACRE, TORCH), build(LAYERS["attention"], case, DTYPES["float32"]), strict=True))
    layer = layers[side]
    assert layer is not None
    few, keywords = attention(_WARMING, dropout).make()
    Step(layer, few, keywords)()
    inputs, _ = case.make()
    step = Step(layer, inputs, keywords)
    peak = peak_bytes(step)
    return Memory(saved_bytes(layer, lambda: layer(*step.inputs, **keywords)), peak)


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The power of a size that values follow best: the slope of their logarithms by least squares.

    Example:
        >>> round(exponent([1, 2, 4], [3, 12, 48]), 6)
        2.0
    """
    xs, ys = ([math.log(number) for number in numbers] for numbers in (sizes, values))
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / sum((x - x_mean) ** 2 for x in xs)


_MEASURES: dict[str, Callable[[GrowthRow, str], float | None]] = {
    "time": GrowthRow.seconds,
    "memory kept for the backward": lambda row, side: row.memory[side].saved,
    "peak memory": lambda row, side: row.memory[side].peak,
}


def _curve(rows: Sequence[GrowthRow], side: str, measure: str) -> tuple[list[float], list[float]]:
    """Numbers of tokens, and what was measured at them."""
    values = [(row.tokens, value) for row in rows if (value := _MEASURES[measure](row, side))]
    return [tokens for tokens, _ in values], [value for _, value in values]


def tables(rows: Sequence[GrowthRow]) -> list[Table]:
    """A table for each dropout, with the fitted powers of n below."""
    found_tables = []
    for dropout, of_dropout in _by_dropout(rows).items():
        notes = []
        for measure in _MEASURES:
            curves = {side: _curve(of_dropout, side, measure) for side in _COMPARED}
            powers = [f"n^{exponent(*curve):.2f} by {side}" for side, curve in curves.items() if len(curve[0]) > 1]
            if powers:
                notes.append(f"{measure}: {', '.join(powers)}")
        notes += [f"{row.name}, {side}: WRONG: {found.problem}" for row in of_dropout
                  for side, found in row.times.sides.items() if found.problem]  # fmt: skip
        cells = [_cells(row) for row in of_dropout]
        found_tables.append(
            Table(f"Attention against the number of tokens, dropout {dropout:g}", HEADINGS, (), cells, notes)
        )
    return found_tables


HEADINGS = (
    *("tokens n", TORCH, NACRE, "torch.nn / nacre", "limit reached by torch.nn", "by nacre"),
    *("kept by torch.nn", "by nacre", "peak of torch.nn", "of nacre"),
)


def _cells(row: GrowthRow) -> list[str]:
    times = ["WRONG" if (seconds := row.seconds(side)) is None else milliseconds(seconds) for side in _COMPARED]
    ratio = "" if row.times.ratio is None else f"{row.times.ratio:.2f}"
    shares = ["" if (share := row.times.share(side)) is None else f"{share:.0%}" for side in _COMPARED]
    saved, peak = ([mebibytes(getattr(row.memory[side], what)) for side in _COMPARED] for what in ("saved", "peak"))
    return [f"{row.tokens:,}", *times, ratio, *shares, *saved, *peak]


def panels(rows: Sequence[GrowthRow]) -> list[Panel]:
    """Time and peak memory of each dropout."""
    units = {"time": ("seconds of a step", 1.0), "peak memory": ("MiB beyond input and parameters", 2.0**-20)}
    return [
        Panel(
            f"{measure}, dropout {dropout:g}",
            "tokens n",
            unit,
            {side: (xs, [y * scale for y in ys]) for side in _COMPARED for xs, ys in [_curve(few, side, measure)]},
            logarithmic=True,
        )
        for dropout, few in _by_dropout(rows).items()
        for measure, (unit, scale) in units.items()
    ]


def _by_dropout(rows: Sequence[GrowthRow]) -> dict[float, list[GrowthRow]]:
    return {dropout: [row for row in rows if row.dropout == dropout] for dropout in {row.dropout: None for row in rows}}


STUDY = Study(
    name="growth",
    help=f"attention's time and memory from {TOKENS[0]} to {TOKENS[-1]:,} tokens, and the powers that they follow",
    rows=len(TOKENS) * len(DROPOUTS),
    run=run,
    tables=tables,
    panels=panels,
)
