"""What ``nacre bench`` measures instead of cases: each study has tables of its own, shown and written by one hand."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Options:
    """What a study may be told.

    Args:
        threads: of torch; None leaves torch's own choice.
        seconds: of rounds or steps; None for the study's own.
        rounds: at most so many.
        steps: of a training; None for the study's own.
        data: a text to learn; None for the source of Python's standard library.
    """

    threads: int | None = None
    seconds: float | None = None
    rounds: int = 15
    steps: int | None = None
    data: Path | None = None


@dataclass(frozen=True)
class Table:
    """A table that is printed and written.

    Args:
        title: above it.
        headings: of its columns.
        text: the columns that are text; the others are numbers.
        rows: the cells of each row.
        notes: below it, a line each.
    """

    title: str
    headings: tuple[str, ...]
    text: tuple[int, ...]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Panel:
    """One part of a chart.

    Args:
        title: above it.
        x: what its horizontal axis shows.
        y: what its vertical axis shows.
        lines: numbers by the name of their line; lines of one name in two panels have one colour.
        logarithmic: both axes.
    """

    title: str
    x: str
    y: str
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    logarithmic: bool = False


class StudyRow(Protocol):
    """What a study finds at a time."""

    @property
    def name(self) -> str:
        """What was measured, for a progress bar."""

    @property
    def wrong(self) -> bool:
        """Whether a result was not what it must be, so that it has no time."""

    def as_json(self) -> dict[str, Any]:
        """All fields, with what follows from them."""


@dataclass(frozen=True)
class Study:
    """A study by the name of its option and files.

    Args:
        name: ``nacre bench --name`` writes ``name.json`` and ``name.md``.
        help: what it measures.
        rows: how many there will be.
        run: measures; its second argument is called with every row as soon as it is there.
        tables: of all rows.
        panels: of a chart of all rows, ``name.png``. Default: no chart.
    """

    name: str
    help: str
    rows: int
    run: Callable[[Options, Callable[[Any], object]], Sequence[Any]]
    tables: Callable[[Sequence[Any]], list[Table]]
    panels: Callable[[Sequence[Any]], list[Panel]] | None = None
