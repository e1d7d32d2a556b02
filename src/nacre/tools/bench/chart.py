"""Charts: how much of the limit each side reaches, case by case; and the curves of a study."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from nacre.applications.files import replacing
from nacre.tools.bench.markdown import TITLES
from nacre.tools.bench.results import COMPILED, NACRE, SIDES, TORCH, BenchReport
from nacre.tools.bench.study import Panel

_COLOURS = {TORCH: "#b0b0b0", COMPILED: "#6f86a8", NACRE: "#d1495b"}
_BAR = 0.27  # of the height that a case has
_LONGEST = 1.25  # of the limit: bars of small cases, which lie in caches, are cut there


def write_chart(report: BenchReport, path: Path) -> None:
    """Writes horizontal bars as a PNG: a column for each allocator, a group for each case, a bar for each side."""
    allocators = report.allocators()
    cases = max((len(report.under(allocator)) for allocator in allocators), default=0)
    figure = Figure(figsize=(4 + 5 * len(allocators), 2 + 0.42 * cases), layout="constrained")
    columns = figure.subplots(1, max(len(allocators), 1), sharey=True, squeeze=False)[0]
    for axes, allocator in zip(columns, allocators, strict=False):
        rows = report.under(allocator)
        for number, side in enumerate(SIDES):
            shares = [row.share(side) or 0.0 for row in rows]
            heights = [place + (number - 1) * _BAR for place in range(len(rows))]
            axes.barh(heights, [min(share, _LONGEST) for share in shares], _BAR, label=side, color=_COLOURS[side])
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set(title=TITLES[allocator], xlim=(0, _LONGEST), yticks=range(len(rows)))
        axes.set_yticklabels([row.name for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("of the limit, forward and backward")
        axes.tick_params(axis="y", length=0)
    if allocators:
        columns[0].legend(frameon=False, loc="lower right")
    figure.suptitle(f"{report.machine.processor}, {report.machine.threads} threads, {report.dtype}")
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=110)


def write_curves(panels: list[Panel], path: Path) -> None:
    """Writes curves as a PNG, two panels beside each other."""
    figure = Figure(figsize=(11, 4 * ((len(panels) + 1) // 2)), layout="constrained")
    for number, panel in enumerate(panels):
        axes = figure.add_subplot((len(panels) + 1) // 2, 2, number + 1)
        lines = {name: line for name, line in panel.lines.items() if line[0]}
        for name, (xs, ys) in lines.items():
            marker = "o" if panel.logarithmic else ""
            axes.plot(xs, ys, marker=marker, markersize=4, linewidth=1.2, label=name, color=_COLOURS.get(name))
        axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
        if panel.logarithmic and lines:
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        if lines:
            axes.legend(frameon=False)
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=110)
