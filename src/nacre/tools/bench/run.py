"""``bench``: machine and ceilings first, then the cases, each allocator in a fresh process."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

from nacre.core import check
from nacre.tools.bench.children import ALLOCATORS, environment, run_job
from nacre.tools.bench.machine import other_load, warnings
from nacre.tools.bench.results import BenchReport, Ceilings, Machine, Row
from nacre.tools.bench.selection import Settings, selected


def bench(
    names: Sequence[str] = (),
    *,
    settings: Settings | None = None,
    allocators: Sequence[str] = tuple(ALLOCATORS),
    on_row: Callable[[Row], object] = lambda row: None,
    on_start: Callable[[BenchReport, int], object] = lambda report, rows: None,
) -> BenchReport:
    """Measures layers by torch.nn, torch.compile and nacre against each other and against the machine's limit.

    Every result is checked before it is timed. The sides of a case run in one process, in an order drawn anew each
    round; each allocator has a fresh process, so that nothing of this one changes the times. The matrix peak is
    measured before the cases and after those of each allocator, and the best counts: what a shared host gives changes,
    and a low peak would flatter every side.

    Args:
        names: layers and blocks, or ``layer/case`` for one case. Default: all.
        settings: dtype, rounds, threads and the like, in place of the default ones.
        allocators: ``"default"`` is the C library's own way, ``"kept"`` has it keep freed memory for every side.
            Default: both.
        on_row: called with every row as soon as it is there.
        on_start: called with the report that has no rows yet, and with their number.

    Raises:
        ValueError: no layer, case or allocator has such a name.
        ChildProcessError: a measuring process died.
    """
    settings = replace(settings or Settings(), names=tuple(names) or (settings.names if settings else ()))
    for allocator in allocators:
        if allocator not in ALLOCATORS:
            rule = f"nacre bench has the allocators {' and '.join(ALLOCATORS)}"
            raise check.error(ValueError, rule, repr(allocator))
    cases = len(selected(settings.names, settings.all_cases))
    machine, found_warnings = describe_machine(settings)
    ceilings = measured_ceilings(settings)
    report = BenchReport(machine, settings.dtype, ceilings, warnings=found_warnings)
    on_start(report, cases * len(allocators))
    for allocator in allocators:
        job = {
            "job": "rows",
            "settings": asdict(settings),
            "allocator": allocator,
            "ceilings": asdict(report.ceilings),
            "checked": [asdict(row) for row in report.rows],
        }
        for values in run_job(job, environment(allocator, settings.threads)):
            row = Row.from_json(values)
            report.rows.append(row)
            on_row(row)
        report.raise_peak(measured_ceilings(settings).matrix_flops)
    return report


def describe_machine(settings: Settings) -> tuple[Machine, list[str]]:
    """The machine as a measuring process finds it, and what speaks against trusting its times just now."""
    found_warnings = warnings(other_load())
    (found,) = run_job({"job": "machine", "settings": asdict(settings)}, environment("default", settings.threads))
    return Machine(**found), found_warnings


def measured_ceilings(settings: Settings) -> Ceilings:
    """The limits of the machine, in a process that keeps its memory."""
    (found,) = run_job({"job": "ceilings", "settings": asdict(settings)}, environment("kept", settings.threads))
    return Ceilings(**found)
