"""The demonstration: every layer checked, and one model trained with torch.nn's layers and with nacre's."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from nacre.applications import Recipe, build
from nacre.applications.gpt import RECIPE
from nacre.applications.training import Result, train
from nacre.blocks import BLOCKS
from nacre.core import native
from nacre.core.spec import LayerSpec
from nacre.layers import LAYERS
from nacre.tools.bench.machine import describe
from nacre.tools.bench.training import AGREEMENT, largest_difference
from nacre.tools.convert import convert
from nacre.tools.gradcheck import gradcheck
from nacre.tools.report import Page, write_page
from nacre.tools.show import show_layers, wide_console


@dataclass(frozen=True)
class LayerCheck:
    """Whether a layer's hand-derived gradients agree with finite differences, in one line."""

    name: str
    case: str
    passed: bool
    summary: str


@dataclass(frozen=True)
class Comparison:
    """The same training with torch.nn's layers and with nacre's."""

    torch: Result
    nacre: Result

    @property
    def difference(self) -> float:
        """The largest relative difference between the two training losses at one step."""
        theirs, ours = (list(side.training_loss.values()) for side in (self.torch, self.nacre))
        return largest_difference(theirs, ours)

    @property
    def agrees(self) -> bool:
        """Whether the two curves are one."""
        return self.difference <= AGREEMENT


def check_layers() -> list[LayerCheck]:
    """Checks the gradients of every layer and block by finite differences in float64."""
    return [check for spec in (*LAYERS.values(), *BLOCKS.values()) if (check := _check(spec)) is not None]


def _check(spec: LayerSpec) -> LayerCheck | None:
    case = next((one for one in spec.cases if one.smooth and not one.bench), None)
    if case is None:
        return None
    torch.manual_seed(0)
    layer = spec.layer(**case.arguments).train(case.training)
    inputs, keywords = case.make(torch.float64)
    report = gradcheck(layer, *inputs, **keywords)
    return LayerCheck(spec.name, case.name, report.ok, report.summary())


def compare(source: Path | None, steps: int, seed: int, console: Console) -> Comparison:
    """Trains the GPT with torch.nn's layers and with nacre's, from the same weights on the same data."""
    results = {}
    columns = (TextColumn("{task.description:12}"), BarColumn(), TextColumn("{task.fields[loss]}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for layers in ("torch", "nacre"):
            application = build("gpt", data=source, recipe=_recipe(steps), seed=seed)
            application.layers = layers
            if layers == "torch":
                convert(application.model, to="torch")
            task = progress.add_task(f"GPT, {layers}", total=steps, loss="")

            def show(step: int, _: int, loss: float, task: int = task) -> None:
                progress.update(task, completed=step, loss=f"step {step:4}, loss {loss:.4f}")  # type: ignore[arg-type]

            results[layers] = train(application, on_step=show)
    return Comparison(**results)


def _recipe(steps: int) -> Recipe:
    return replace(RECIPE, steps=steps, validate_every=steps)


def demo(page: Path, *, source: Path | None = None, steps: int = 300, seed: int = 0) -> bool:
    """Shows the table of layers, checks their gradients, compares the two trainings and writes the page.

    Args:
        page: the HTML file to write; it needs no other file and no network.
        source: a text file to learn. Default None: the source of Python's standard library.
        steps: of each of the two trainings. Default 300.
        seed: of weights and data order. Default 0.

    Returns:
        Whether every check passed and the loss curves agree.
    """
    console = wide_console()
    rows = show_layers(console)
    if missing := native.unavailable():
        console.print(f"The formulas serve every layer: {missing}.")
    checks = check_layers()
    for check in checks:
        console.print(f"{'passed' if check.passed else 'FAILED'}  {check.name:22} {check.summary}", highlight=False)
    comparison = compare(source, steps, seed, console)
    _print(comparison, console)
    write_page(
        page,
        Page(
            machine=f"{describe()}; float32",
            rows=rows,
            checks=checks,
            torch=comparison.torch,
            nacre=comparison.nacre,
            difference=comparison.difference,
            agreement=AGREEMENT,
        ),
    )
    console.print(f"Wrote {page}")
    return comparison.agrees and all(check.passed for check in checks)


def _print(comparison: Comparison, console: Console) -> None:
    for name, result in (("torch.nn", comparison.torch), ("nacre", comparison.nacre)):
        console.print(
            f"{name:9} validation loss {result.final['validation_loss']:.4f} after {result.step} steps,"
            f" {result.seconds:.1f} s",
            highlight=False,
        )
    verdict = "agree" if comparison.agrees else "DISAGREE"
    console.print(
        f"The loss curves {verdict}: largest relative difference {comparison.difference:.1e}, limit {AGREEMENT:.0e}.",
        highlight=False,
    )
