"""The drawing of a layer: the output above the input with lines between what depends on what, and the whole matrix."""

from dataclasses import dataclass
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from nacre.tools.overview.connections import Connections
from nacre.tools.overview.scenes import Scene

WIDTH, HEIGHT = 520, 270
_PLANES = 280  # width of the part on the left, in which the planes are drawn
_MATRIX = 184  # largest side of the matrix on the right
_MOST_LINES = 160  # of more connections only those of the output looked at are drawn

# blue and orange of one lightness are told apart by everybody, and both stand out from white and from black
STYLE = """
.nacre-picture { --ink: #1f2328; --quiet: #6e7781; --paper: #f3f5f7; --edge: #aab3bd; --in: #0b62b0; --out: #b34700; }
.nacre-picture text { fill: var(--ink); font: 13px system-ui, sans-serif; }
.nacre-picture .note { fill: var(--quiet); font-size: 12px; }
.nacre-picture .cell { fill: var(--paper); stroke: var(--edge); stroke-width: 1; stroke-linejoin: round; }
.nacre-picture .silent { fill: none; stroke-dasharray: 2 2; }
.nacre-picture .in { fill: var(--in); }
.nacre-picture .out { fill: var(--out); stroke: var(--out); }
.nacre-picture .line { stroke: var(--quiet); stroke-width: 0.8; opacity: 0.28; }
.nacre-picture .seen { stroke: var(--in); stroke-width: 1.6; opacity: 0.9; }
.nacre-picture .frame { fill: none; stroke: var(--edge); stroke-width: 1; }
.nacre-picture .row { fill: none; stroke: var(--out); stroke-width: 1.6; }
@media (prefers-color-scheme: dark) {
.nacre-picture { --ink: #e6edf3; --quiet: #9aa4af; --paper: #1c232b; --edge: #4d5763; --in: #6cb6ff; --out: #ff9d5c; }
}
@media print {
.nacre-picture { --ink: #000; --quiet: #555; --paper: #f6f6f6; --edge: #aaa; --in: #0b62b0; --out: #b34700; }
}
"""


@dataclass(frozen=True)
class _Plane:
    """A grid of positions, seen from the side: rows lie behind one another."""

    rows: int
    columns: int
    left: float
    top: float
    step: float
    lean: float
    depth: float

    def corner(self, row: float, column: float) -> tuple[float, float]:
        x = self.left + column * self.step + (self.rows - row) * self.lean
        return x, self.top + row * self.depth

    def centre(self, place: int) -> tuple[float, float]:
        row, column = divmod(place, self.columns)
        return self.corner(row + 0.5, column + 0.5)

    def outline(self, place: int) -> str:
        row, column = divmod(place, self.columns)
        corners = [self.corner(row + below, column + right) for below, right in ((0, 0), (0, 1), (1, 1), (1, 0))]
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)


def draw(title: str, scene: Scene, connections: Connections) -> Element:
    """The picture as an SVG element, with its title and what it shows in words for those who do not see it."""
    label = f"{title}: {caption(scene, connections)}"
    picture = Element(
        "svg", {"viewBox": f"0 0 {WIDTH} {HEIGHT}", "class": "nacre-picture", "role": "img", "aria-label": label}
    )
    SubElement(picture, "title").text = label
    _draw_planes(picture, scene, connections)
    _draw_matrix(picture, connections)
    return picture


def caption(scene: Scene, connections: Connections) -> str:
    """What the picture shows, as a sentence.

    Example:
        >>> scene = Scene("rows", "each each", "each each", "values", "values")
        >>> caption(scene, Connections(((1.0, 0.0), (0.0, 1.0)), (1, 2), (1, 2)))
        'of 2 values out and 2 values in, each depends on its own alone.'
    """
    outputs, inputs = len(connections.strengths), len(connections.strengths[0])
    return f"of {outputs} {scene.results} out and {inputs} {scene.cells} in, {connections.describe()}."


def standalone(picture: Element) -> str:
    """The picture as a file of its own: with its style, for light and dark pages."""
    copied = ElementTree.fromstring(ElementTree.tostring(picture))
    copied.set("xmlns", "http://www.w3.org/2000/svg")
    copied.set("width", str(WIDTH))
    copied.set("height", str(HEIGHT))
    style = Element("style")
    style.text = STYLE
    copied.insert(1, style)
    return ElementTree.tostring(copied, encoding="unicode") + "\n"


def _plane(grid: tuple[int, int], top: float, height: float) -> _Plane:
    rows, columns = grid
    step = min(30.0, (_PLANES - 30) / (columns + 0.5 * rows))
    depth = min(0.55 * step, height / rows)
    lean = 0.5 * step if rows > 1 else 0.3 * step
    width = columns * step + rows * lean
    return _Plane(rows, columns, (_PLANES - width) / 2, top + (height - rows * depth) / 2, step, lean, depth)


def _draw_planes(picture: Element, scene: Scene, connections: Connections) -> None:
    above = _plane(connections.outputs, 30, 84)
    below = _plane(connections.inputs, 156, 84)
    watched = connections.watched
    strengths = connections.strengths[watched]
    _text(picture, _PLANES / 2, 18, f"output: {scene.results}", "middle")
    _text(picture, _PLANES / 2, HEIGHT - 10, f"input: {scene.cells}", "middle")
    for place in range(len(strengths)):
        SubElement(picture, "polygon", {"class": "cell", "points": below.outline(place)})
        if strengths[place]:
            shade = {"class": "in", "points": below.outline(place), "opacity": _opacity(strengths[place])}
            SubElement(picture, "polygon", shade)
    pairs = [(output, source) for output in range(len(connections.strengths)) for source in connections.sources(output)]
    for output, source in pairs if len(pairs) <= _MOST_LINES else ():
        if output != watched:
            _line(picture, "line", below.centre(source), above.centre(output))
    for source in connections.sources(watched):
        _line(picture, "line seen", below.centre(source), above.centre(watched))
    for place in range(len(connections.strengths)):
        kind = "out" if place == watched else "" if connections.sources(place) else "silent"
        SubElement(picture, "polygon", {"class": f"cell {kind}".strip(), "points": above.outline(place)})


def _draw_matrix(picture: Element, connections: Connections) -> None:
    rows, columns = len(connections.strengths), len(connections.strengths[0])
    size = min(_MATRIX / rows, _MATRIX / columns, 26)
    left = _PLANES + 32 + (WIDTH - _PLANES - 32 - 12 - columns * size) / 2
    top = 30 + (HEIGHT - 60 - rows * size) / 2
    _text(picture, left + columns * size / 2, top - 9, f"{columns} in", "middle", "note")
    _text(picture, left - 6, top + rows * size / 2 + 4, f"{rows} out", "end", "note")
    for row, strengths in enumerate(connections.strengths):
        for column, strength in enumerate(strengths):
            if strength:
                place = _box(left + column * size, top + row * size, size, size)
                SubElement(picture, "rect", {"class": "in", **place, "opacity": _opacity(strength)})
    SubElement(picture, "rect", {"class": "frame", **_box(left, top, columns * size, rows * size)})
    watched = _box(left, top + connections.watched * size, columns * size, size)
    SubElement(picture, "rect", {"class": "row", **watched})


def _opacity(strength: float) -> str:
    return f"{0.25 + 0.75 * strength**0.5:.2f}"


def _box(x: float, y: float, width: float, height: float) -> dict[str, str]:
    return {"x": f"{x:.1f}", "y": f"{y:.1f}", "width": f"{width:.1f}", "height": f"{height:.1f}"}


def _line(picture: Element, kind: str, start: tuple[float, float], end: tuple[float, float]) -> None:
    numbers = dict(zip(("x1", "y1", "x2", "y2"), (f"{number:.1f}" for number in (*start, *end)), strict=True))
    SubElement(picture, "line", {"class": kind, **numbers})


def _text(picture: Element, x: float, y: float, text: str, anchor: str, kind: str | None = None) -> None:
    given = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor, **({"class": kind} if kind else {})}
    SubElement(picture, "text", given).text = text
