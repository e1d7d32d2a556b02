"""The report as Markdown, to be pasted into a file."""

from collections.abc import Sequence

from nacre.tools.bench.results import COMPILED, NACRE, TORCH, BenchReport, Row, Side
from nacre.tools.bench.study import Table
from nacre.tools.quantities import milliseconds

HEADINGS = (
    "case",
    "inputs",
    "limit",
    TORCH,
    COMPILED,
    NACRE,
    "torch.nn / nacre",
    "best / nacre",
    "limit reached by torch.nn",
    "by nacre",
    "page faults of torch.nn",
    "of nacre",
    "nacre ran",
)
"""The columns of a table; the first two and the last are text."""

TITLES = {
    "default": "with the default allocator",
    "kept": "with memory kept for everybody, torch's own operations too",
}

EXPLANATION = (
    "One call, forward and backward; medians over interleaved rounds, after the results were compared with float64's. "
    '"best" is the faster of torch.nn and torch.compile. The limit is that of matrix products or of compulsory traffic '
    "to memory, whichever takes longer; what fits into the processor's caches can go beyond it."
)


def markdown(report: BenchReport) -> str:
    """Machine, ceilings and a table for each allocator."""
    parts = ["\n".join(f"- {line}" for line in report.header()), EXPLANATION]
    for allocator in report.allocators():
        rows = report.under(allocator)
        parts += [f"## Forward and backward, {TITLES[allocator]}", report.summary(allocator)]
        parts.append(_table(HEADINGS, [cells(row) for row in rows], left=(0, 1, len(HEADINGS) - 1)))
        if problems := problem_lines(rows):
            parts.append("\n".join(f"- {line}" for line in problems))
    return "\n\n".join(parts) + "\n"


def tables_markdown(header: list[str], tables: list[Table]) -> str:
    """The tables of a study."""
    parts = ["\n".join(f"- {line}" for line in header)]
    for table in tables:
        parts += [f"## {table.title}", _table(table.headings, table.rows, table.text)]
        if table.notes:
            parts.append("\n".join(f"- {line}" for line in table.notes))
    return "\n\n".join(parts) + "\n"


def cells(row: Row) -> list[str]:
    """A row's cells in the order of ``HEADINGS``."""
    return [
        row.name,
        row.inputs,
        milliseconds(row.limit),
        *(_time(row.sides.get(side)) for side in (TORCH, COMPILED, NACRE)),
        _ratio(row.ratio),
        _ratio(row.best_ratio),
        *(_percent(row.share(side)) for side in (TORCH, NACRE)),
        *(_faults(row.sides.get(side)) for side in (TORCH, NACRE)),
        row.implementation,
    ]


def problem_lines(rows: list[Row]) -> list[str]:
    """Why sides were not timed, a line each."""
    return [
        f"{row.name}, {name}: {'WRONG: ' if side.wrong else 'not compiled: '}{side.problem}"
        for row in rows
        for name, side in row.sides.items()
        if side.problem
    ]


def _time(side: Side | None) -> str:
    if side is None:
        return ""
    if side.seconds is None:
        return "WRONG" if side.wrong else "failed"
    return milliseconds(side.seconds)


def _faults(side: Side | None) -> str:
    return "" if side is None or side.page_faults is None else f"{side.page_faults:,.0f}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _table(headings: tuple[str, ...], rows: Sequence[Sequence[str]], left: tuple[int, ...]) -> str:
    rules = [":--" if column in left else "--:" for column in range(len(headings))]
    return "\n".join("| " + " | ".join(line) + " |" for line in [list(headings), rules, *rows])
