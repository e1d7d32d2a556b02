"""Writes the demonstration's page: one HTML file that needs no other file and no network."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from nacre.applications.training import Result
from nacre.tools import pages
from nacre.tools.quantities import quantity
from nacre.tools.table import LayerRow


@dataclass(frozen=True)
class Page:
    """What the page shows.

    Args:
        machine: processor, threads, versions.
        rows: the table of layers.
        checks: the gradient checks, each with ``name``, ``case``, ``passed`` and ``summary``.
        torch: the training with torch.nn's layers.
        nacre: the training with nacre's layers.
        difference: the largest relative difference between the two loss curves.
        agreement: the limit on that difference.
    """

    machine: str
    rows: Sequence[LayerRow]
    checks: Sequence[Any]
    torch: Result
    nacre: Result
    difference: float
    agreement: float


def write_page(path: Path, page: Page) -> None:
    """Writes the page; no half-written one is ever seen."""
    environment = pages.templates()
    environment.filters["quantity"] = quantity
    text = environment.get_template("demo.html").render(
        page=page,
        losses=_losses({"torch.nn": page.torch.training_loss, "nacre": page.nacre.training_loss}),
        differences=_differences(page),
    )
    pages.write(path, text)


def _losses(curves: Mapping[str, Mapping[int, float]]) -> str:
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="training loss")
    styles: list[dict[str, Any]] = [{"linewidth": 4, "alpha": 0.35}, {"linewidth": 1.2}]
    for (label, curve), style in zip(curves.items(), styles, strict=True):
        axes.plot(list(curve), list(curve.values()), label=label, **style)
    axes.legend(frameon=False)
    return _svg(figure)


def _differences(page: Page) -> str:
    figure = Figure(figsize=(7, 2.4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="relative difference", yscale="log")
    theirs, ours = page.torch.training_loss, page.nacre.training_loss
    # a logarithmic axis has no place for equal losses: they are drawn at float64's precision
    values = [max(abs(ours[step] - theirs[step]) / abs(theirs[step]), 1e-16) for step in theirs]
    axes.plot(list(theirs), values, linewidth=1)
    axes.axhline(page.agreement, linestyle="--", linewidth=1, color="tab:red")
    return _svg(figure)


def _svg(figure: Figure) -> str:
    """The figure as an SVG element in the colour of the page's text, without a background."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "nacre"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace("#000000", "currentColor")
