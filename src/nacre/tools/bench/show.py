"""The report on a terminal."""

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from nacre.tools.bench import study
from nacre.tools.bench.markdown import HEADINGS, TITLES, cells, problem_lines
from nacre.tools.bench.results import BenchReport

WIDTH = 220
"""Columns of the widest table; a wrapped line reads better than a folded cell."""


def console() -> Console:
    """The terminal, taken to be at least as wide as the widest table."""
    found = Console()
    return Console(width=max(found.width, WIDTH))


def progress(console: Console) -> Progress:
    """A bar with the name of the case that was measured last."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def show_header(lines: list[str], console: Console) -> None:
    """Prints machine, ceilings and warnings."""
    for line in lines:
        console.print(line, style="bold red" if line.startswith("WARNING") else None, highlight=False, markup=False)


def show_report(report: BenchReport, console: Console) -> None:
    """Prints a table for each allocator, then why sides were not timed."""
    for allocator in report.allocators():
        rows = report.under(allocator)
        table = _table(f"Forward and backward, {TITLES[allocator]}", HEADINGS, left=(0, 1, len(HEADINGS) - 1))
        for row in rows:
            table.add_row(*cells(row), style="red" if row.wrong else None)
        console.print(table, highlight=False, markup=False)
        console.print(report.summary(allocator), highlight=False)
        for line in problem_lines(rows):
            console.print(line, highlight=False, markup=False)


def show_table(given: study.Table, console: Console) -> None:
    """Prints a table of a study, and its notes."""
    table = _table(given.title, given.headings, left=given.text)
    for row in given.rows:
        table.add_row(*row)
    console.print(table, highlight=False, markup=False)
    for line in given.notes:
        console.print(line, highlight=False, markup=False)


def _table(title: str, headings: tuple[str, ...], left: tuple[int, ...]) -> Table:
    table = Table(title=title, box=SIMPLE)
    for column, heading in enumerate(headings):
        table.add_column(heading, justify="left" if column in left else "right", no_wrap=column == 0)
    return table
