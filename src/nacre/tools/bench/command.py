"""The command ``nacre bench``: its arguments, and what it does with them."""

import argparse
import json
from pathlib import Path
from typing import Any

from nacre.applications.files import replacing
from nacre.core import check
from nacre.tools.bench import company, growth, training, vocabulary
from nacre.tools.bench.children import ALLOCATORS
from nacre.tools.bench.run import bench, describe_machine
from nacre.tools.bench.selection import DTYPES, Settings
from nacre.tools.bench.study import Options, Study

STUDIES = (company.STUDY, growth.STUDY, training.STUDY, vocabulary.STUDY)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Gives ``parser`` the arguments of ``nacre bench``.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_arguments(parser)
        >>> parser.parse_args(["layer_norm", "--threads", "1"]).threads
        1
    """
    default = Settings()
    parser.add_argument(
        "names", nargs="*", metavar="LAYER", help="layers and blocks, or LAYER/CASE for one case (default: all)"
    )
    parser.add_argument("--all-cases", action="store_true", help="every case, not only those that users run")
    parser.add_argument("--dtype", choices=list(DTYPES), default=default.dtype, help=f"(default: {default.dtype})")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--rounds", type=int, metavar="N", default=default.rounds, help=f"at most (default: {default.rounds})"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        metavar="X",
        help=f"of rounds for each case (default: {default.seconds}; with --company of steps for each process: 3)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="of torch (default: torch's own choice)")
    parser.add_argument(
        "--allocator",
        choices=[*ALLOCATORS, "both"],
        default="both",
        help="the C library's own way, freed memory kept for every side, or one after the other (default: both)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", default=Path("bench"), help="for bench.json, bench.md and bench.png"
    )
    studies = parser.add_argument_group(
        "instead of cases", "a study of its own, which takes no names"
    ).add_mutually_exclusive_group()
    for study in STUDIES:
        studies.add_argument(f"--{study.name}", dest="study", action="store_const", const=study, help=study.help)
    parser.add_argument("--steps", type=int, metavar="N", help="of --training")
    parser.add_argument(
        "--data", type=Path, metavar="FILE", help="text for --training (default: Python's standard library)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints and writes what the arguments ask for.

    Returns:
        The exit status: 1 where a side gave a wrong result, otherwise 0.

    Raises:
        ValueError: a name or a number that cannot be used.
        OSError: a measuring process died, or the results cannot be written.
        ModuleNotFoundError: a package of the ``report`` extra is missing.
    """
    default = Settings()
    settings = Settings(
        names=tuple(arguments.names),
        dtype=arguments.dtype,
        all_cases=arguments.all_cases,
        compile=not arguments.no_compile,
        rounds=arguments.rounds,
        seconds=default.seconds if arguments.seconds is None else arguments.seconds,
        threads=arguments.threads,
    )
    if arguments.study:
        return _study(arguments.study, settings, _options(arguments), arguments.out)
    return _bench(settings, list(ALLOCATORS) if arguments.allocator == "both" else [arguments.allocator], arguments.out)


def _bench(settings: Settings, allocators: list[str], folder: Path) -> int:
    from nacre.tools.bench.chart import write_chart
    from nacre.tools.bench.markdown import markdown
    from nacre.tools.bench.show import console, progress, show_header, show_report

    terminal = console()
    with progress(terminal) as bar:
        task = bar.add_task("machine", total=None)

        def start(report: Any, rows: int) -> None:
            show_header(report.header(), terminal)
            bar.update(task, description="cases", total=rows)

        report = bench(
            settings=settings,
            allocators=allocators,
            on_start=start,
            on_row=lambda row: bar.update(task, advance=1, description=f"{row.name}, {row.allocator}"),
        )
    show_report(report, terminal)
    terminal.print(report.limits, highlight=False)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "bench.json", json.dumps(report.as_json(), indent=1))
    _write(folder / "bench.md", markdown(report))
    write_chart(report, folder / "bench.png")
    terminal.print(f"Wrote bench.json, bench.md and bench.png into {folder}", highlight=False)
    return 0 if report.ok else 1


def _options(arguments: argparse.Namespace) -> Options:
    if arguments.names:
        rule = f"--{arguments.study.name} takes no names of layers"
        raise check.error(ValueError, rule, " ".join(arguments.names))
    if arguments.steps is not None and arguments.steps < 1:
        raise check.error(ValueError, "steps of a training must be at least 1", str(arguments.steps))
    return Options(arguments.threads, arguments.seconds, arguments.rounds, arguments.steps, arguments.data)


def _study(study: Study, settings: Settings, options: Options, folder: Path) -> int:
    from nacre.tools.bench.chart import write_curves
    from nacre.tools.bench.markdown import tables_markdown
    from nacre.tools.bench.show import console, progress, show_header, show_table

    terminal = console()
    machine, warnings = describe_machine(settings)
    header = [f"{machine}; float32", *(f"WARNING: {text}" for text in warnings)]
    show_header(header, terminal)
    with progress(terminal) as bar:
        task = bar.add_task(study.name, total=study.rows)
        rows = study.run(options, lambda row: bar.update(task, advance=1, description=row.name))
    tables = study.tables(rows)
    for table in tables:
        show_table(table, terminal)
    folder.mkdir(parents=True, exist_ok=True)
    found = {"header": header, "rows": [row.as_json() for row in rows]}
    _write(folder / f"{study.name}.json", json.dumps(found, indent=1))
    _write(folder / f"{study.name}.md", tables_markdown(header, tables))
    if study.panels is not None:
        write_curves(study.panels(rows), folder / f"{study.name}.png")
    terminal.print(f"Wrote {study.name}.* into {folder}", highlight=False)
    return 1 if any(row.wrong for row in rows) else 0


def _write(path: Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
