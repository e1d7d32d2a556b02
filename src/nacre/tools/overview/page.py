"""The overview as a page: one HTML file that needs no other file and no network; and its pictures as files."""

import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import torch
from latex2mathml.converter import convert as to_mathml
from markupsafe import Markup

from nacre.applications import APPLICATIONS
from nacre.blocks import BLOCKS
from nacre.core.spec import LayerSpec
from nacre.layers import LAYERS
from nacre.tools import pages
from nacre.tools.formula import NAMES, CostFormula, cost_formula
from nacre.tools.overview.connections import connect
from nacre.tools.overview.picture import STYLE, caption, draw, standalone
from nacre.tools.overview.scenes import scenes_of
from nacre.tools.overview.usage import Usage, usage
from nacre.tools.quantities import quantity
from nacre.tools.table import LayerRow, layer_table


@dataclass(frozen=True)
class Drawn:
    """A picture of a layer: the case that ran, the drawing, what it shows in words."""

    case: str
    picture: Element
    caption: str

    @property
    def inline(self) -> Markup:
        """The drawing as part of a page."""
        return Markup(ElementTree.tostring(self.picture, encoding="unicode"))


@dataclass(frozen=True)
class Sheet:
    """What the page shows of a layer.

    Args:
        spec: the layer's description.
        pictures: who depends on whom, a picture for each call that was run.
        formula: what it computes, from its docstring.
        cost: its cost in letters.
        row: its bill for a shape that users run.
        usage: where it is used.
    """

    spec: LayerSpec
    pictures: tuple[Drawn, ...]
    formula: Markup
    cost: CostFormula
    row: LayerRow
    usage: Usage

    @property
    def parameters(self) -> Markup | None:
        """Their number as a formula; None where there are none."""
        return mathml(self.cost.latex("parameters")) if self.cost.parameters != 0 else None

    @property
    def counts(self) -> list[tuple[str, Markup]]:
        """The other formulas of the cost that are not 0."""
        given = [name for name, expression in self.cost.items() if expression != 0 and name != "parameters"]
        counted = [(NAMES[name], mathml(self.cost.latex(name))) for name in given]
        return [*counted, *((letter, mathml(self.cost.latex(letter))) for letter in self.cost.where)]

    @property
    def growth(self) -> list[tuple[str, Markup]]:
        """How time and memory grow, backward where it is otherwise than forward."""
        cost = self.cost
        backward = [("backward time", cost.backward_time)] if cost.backward_time != cost.time else []
        growths = [("time", cost.time), *backward, ("memory kept", cost.saved)]
        return [(name, mathml(_growth_as_latex(text))) for name, text in growths]

    @property
    def replaces(self) -> str | None:
        """The torch.nn class whose place it takes."""
        return None if self.spec.replaces is None else f"torch.nn.{self.spec.replaces.__name__}"


def sheets() -> list[Sheet]:
    """Runs, draws and describes every layer and block."""
    used = usage()
    rows = layer_table()
    specs = [*LAYERS.values(), *BLOCKS.values()]
    return [_sheet(spec, row, used[spec.name]) for spec, row in zip(specs, rows, strict=True)]


def _sheet(spec: LayerSpec, row: LayerRow, used: Usage) -> Sheet:
    case = next((case for case in spec.cases if case.bench), spec.cases[0])
    with torch.device("meta"):
        layer = spec.layer(**case.arguments)
    drawn = []
    for scene in scenes_of(spec):
        connections = connect(spec, scene)
        words = caption(scene, connections)
        drawn.append(Drawn(scene.case, draw(spec.layer.__name__, scene, connections), words[0].upper() + words[1:]))
    return Sheet(spec, tuple(drawn), formula_of(spec.layer), cost_formula(layer), row, used)


def formula_of(layer: type[torch.nn.Module]) -> Markup:
    """The formula in a layer's docstring, as MathML.

    Example:
        >>> import nacre
        >>> formula_of(nacre.ReLU).startswith("<math ")
        True
    """
    lines = iter(inspect.cleandoc(layer.__doc__ or "").splitlines())
    first = next((line for line in lines if line.startswith(".. math::")), None)
    if first is None:
        return Markup("")
    formula = [first.removeprefix(".. math::")]
    for line in lines:
        if line and not line.startswith(" "):
            break
        formula.append(line.strip())
    return mathml(_in_lines(" ".join(formula).strip()), display="block")


def _in_lines(latex: str) -> str:
    """A formula with what it sets side by side below one another instead, equals signs aligned, to fit on a phone."""
    lines = re.split(r"\\\\|\\qquad|\\quad(?=\\text)", latex)
    if len(lines) == 1:
        return latex
    aligned = (line if "&" in line else re.sub(r"=|\\sim", r"&\g<0>", line, count=1) for line in lines)
    return " ".join([r"\begin{align*}", r" \\ ".join(aligned), r"\end{align*}"])


def mathml(latex: str, display: str = "inline") -> Markup:
    """LaTeX as MathML, which browsers show without a script."""
    return Markup(to_mathml(latex, display=display))


def _growth_as_latex(text: str) -> str:
    """``O(N L (L + E))`` as LaTeX."""
    apart = re.sub(r"(?<=[\w)]) (?=[\w(])", r"\\, ", text)
    return re.sub(r"_(\w+)", r"_{\1}", apart)


def write_page(path: Path, shown: list[Sheet]) -> None:
    """Writes the page; no half-written one is ever seen."""
    environment = pages.templates()
    environment.filters["quantity"] = quantity
    text = environment.get_template("overview.html").render(
        sheets=shown, style=Markup(STYLE), applications=APPLICATIONS, blocks=BLOCKS
    )
    pages.write(path, text)


def write_pictures(folder: Path, shown: list[Sheet]) -> list[Path]:
    """Writes each picture as an SVG file, ``linear.svg``, further ones of a layer as ``lstm_2.svg``."""
    paths = []
    for sheet in shown:
        for number, drawn in enumerate(sheet.pictures, start=1):
            path = folder / f"{sheet.spec.name}{f'_{number}' if number > 1 else ''}.svg"
            pages.write(path, standalone(drawn.picture))
            paths.append(path)
    return paths
