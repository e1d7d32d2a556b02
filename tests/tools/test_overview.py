"""The visual overview: the patterns found, the pictures, and the page, which a real browser opens if there is one."""

import os
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from nacre import cli
from nacre.applications import APPLICATIONS
from nacre.blocks import BLOCKS
from nacre.core.spec import Case, LayerSpec, Normal
from nacre.layers import LAYERS
from nacre.tools.overview import page
from nacre.tools.overview.connections import Connections, connect
from nacre.tools.overview.picture import caption, draw, standalone
from nacre.tools.overview.scenes import Scene, scenes_of
from nacre.tools.overview.usage import usage
from tests.tools import browser

SPECS = {**LAYERS, **BLOCKS}
ROWS = Scene("", "each each", "each each", "values", "values")


@pytest.fixture(scope="module")
def sheets():
    with torch.random.fork_rng(devices=[]):
        return page.sheets()


@pytest.fixture(scope="module")
def text(sheets, tmp_path_factory):
    path = tmp_path_factory.mktemp("overview") / "deep" / "overview.html"
    page.write_page(path, sheets)
    assert [file.name for file in path.parent.iterdir()] == ["overview.html"], "nothing temporary is left"
    return path.read_text(encoding="utf-8")


# ---- the patterns, which no one typed

EVERY, OWN = "each depends on every one", "each depends on its own alone"
ROW, BEFORE = "each depends on all of its own row", "each depends on itself and all before it"
PATTERNS = {
    "attention": [EVERY, BEFORE],
    "conv2d": ["each depends on a window of 3 x 3 around it, fewer at the edge"],
    "cross_entropy": [ROW],
    "embedding": ["each depends on one alone, which the input picks"],
    "gelu": [OWN],
    "gru": [BEFORE, EVERY],
    "layer_norm": [ROW],
    "linear": [EVERY],
    "linear_cross_entropy": [ROW],
    "log_softmax": [ROW],
    "lstm": [BEFORE, EVERY],
    "residual_block": [ROW],
    "residual_dropout": [OWN],
    "residual_dropout_layer_norm": [ROW],
    "sigmoid": [OWN],
    "silu": [OWN],
    "softmax": [ROW],
    "tanh": [OWN],
    "transformer_block": [BEFORE],
    "transformer_encoder_layer": [EVERY],
}


def test_patterns(sheets):
    """All to all, a sliding window, a chain in time, a row, itself alone: as the layers are known to be."""
    found = {sheet.spec.name: [drawn.caption.split(", ", 1)[1][:-1] for drawn in sheet.pictures] for sheet in sheets}
    for name in ("relu", "dropout"):  # what is negative or dropped passes nothing on
        assert re.fullmatch(OWN + r"; \d+ of 21 on nothing", found.pop(name)[0])
    assert found == PATTERNS


def test_what_is_not_connected_is_what_the_layer_lets_through():
    """The positive values for ReLU, a table row for each token, the taps of a dilated kernel."""
    relu = connect(LAYERS["relu"], scenes_of(LAYERS["relu"])[0])
    case = next(case for case in LAYERS["relu"].cases if case.name == "rows")
    values = case.make(torch.float64)[0][0].flatten().tolist()
    assert [bool(relu.sources(place)) for place in range(21)] == [value > 0 for value in values]

    table = connect(LAYERS["embedding"], scenes_of(LAYERS["embedding"])[0])
    tokens = next(case for case in LAYERS["embedding"].cases if case.name == "tokens").make()[0][0]
    assert [table.sources(place) for place in range(10)] == [[token] for token in tokens.flatten().tolist()]

    dilated = Case(
        "dilated", {"in_channels": 2, "out_channels": 3, "kernel_size": 2, "dilation": 2}, (Normal((1, 2, 4, 5)),)
    )
    scene = Scene("dilated", "first all each each", "first all each each", "pixels", "pixels")
    found = connect(spec_with(LAYERS["conv2d"], dilated), scene)
    assert (found.inputs, found.outputs) == ((4, 5), (2, 3)) and found.sources(0) == [0, 2, 10, 12]
    assert found.describe() == "each depends on 4 to 4 of 20"


def spec_with(spec, case):
    return LayerSpec(**{**vars(spec), "cases": (case,)})


def test_two_runs_draw_the_same_and_leave_the_random_state():
    state = torch.random.get_rng_state()
    first, second = (connect(LAYERS["dropout"], scenes_of(LAYERS["dropout"])[0]) for _ in range(2))
    assert first == second and torch.equal(state, torch.random.get_rng_state())


def test_a_new_layer_is_drawn_without_a_scene_of_its_own():
    case = Case("pairs", {"num_features": 3, "affine": False}, (Normal((4, 3)),))
    spec = LayerSpec("batch_norm", torch.nn.BatchNorm1d, None, "", "", (), dict, lambda: None, (case,))
    (scene,) = scenes_of(spec)
    assert (scene.case, scene.source) == ("pairs", "each each")
    assert connect(spec, scene).describe() == OWN  # in evaluation


@pytest.mark.parametrize(
    ("strengths", "grid", "watched"),
    [
        ([[1, 0], [0, 1]], (1, 2), 0),
        ([[0, 0, 0], [0, 0, 0], [0, 0, 1]], (1, 3), 2),  # the only one that depends on anything
        ([[1] * 9] * 9, (3, 3), 4),
    ],
)
def test_the_output_looked_at(strengths, grid, watched):
    assert Connections(tuple(map(tuple, strengths)), grid, grid).watched == watched


# ---- the pictures


def test_a_picture_draws_what_is_connected():
    connections = Connections(((1.0, 0.25, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 0.0)), (1, 3), (1, 3))
    picture = draw("Layer", ROWS, connections)
    kinds = [one.get("class") for one in picture.iter()]
    assert kinds.count("line seen") == 1 and kinds.count("line") == 2  # the output in the middle, and the others
    assert kinds.count("cell out") == 1 and kinds.count("cell silent") == 1 and kinds.count("cell") == 3 + 1
    matrix = [one for one in picture.iter("rect") if one.get("class") == "in"]
    assert [one.get("opacity") for one in matrix] == ["1.00", "0.62", "1.00"]  # 0.25 + 0.75 sqrt(0.25)
    words = "Layer: of 3 values out and 3 values in, each depends on 0 to 2 of 3."
    assert picture.get("role") == "img" and picture.get("aria-label") == words == picture.find("title").text
    assert caption(ROWS, connections) in words


def test_everything_lies_within_the_picture(sheets):
    for sheet in sheets:
        for drawn in sheet.pictures:
            width, height = map(float, drawn.picture.get("viewBox").split()[2:])
            for one in drawn.picture.iter():
                for pair in one.get("points", "").split():
                    x, y = map(float, pair.split(","))
                    assert 0 <= x <= width and 0 <= y <= height, sheet.spec.name
                if one.tag == "rect":
                    assert float(one.get("x")) + float(one.get("width")) <= width, sheet.spec.name
                    assert float(one.get("y")) + float(one.get("height")) <= height, sheet.spec.name


def test_svg_files(sheets, tmp_path):
    paths = page.write_pictures(tmp_path / "pictures", sheets)
    assert {path.name for path in paths} == {path.name for path in (tmp_path / "pictures").iterdir()}
    assert {path.stem for path in paths} == {*SPECS, "attention_2", "lstm_2", "gru_2"}
    for path in paths:
        root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and root[0].tag.endswith("title") and root[0].text
        assert "prefers-color-scheme: dark" in root[1].text
        assert not {"href", "src"} & {name.split("}")[-1] for one in root.iter() for name in one.attrib}


def test_the_pictures_in_the_repository_are_those_which_the_command_writes(sheets, tmp_path):
    """If not: ``nacre layers --svg docs/pictures``."""
    folder = Path(__file__).parents[2] / "docs" / "pictures"
    written = {path.name: path.read_text(encoding="utf-8") for path in page.write_pictures(tmp_path, sheets)}
    assert written == {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}
    shown = re.findall(r"\(docs/pictures/(\w+\.svg)\)", (folder.parents[1] / "README.md").read_text(encoding="utf-8"))
    assert shown and set(shown) <= set(written)


def test_the_standalone_picture_leaves_the_original():
    picture = draw("Layer", ROWS, Connections(((1.0,),), (1, 1), (1, 1)))
    before = ElementTree.tostring(picture)
    assert standalone(picture) == standalone(picture) and ElementTree.tostring(picture) == before


# ---- where layers are used


def test_usage_is_found_in_the_code():
    found = usage()
    assert set(found) == set(SPECS)
    assert found["lstm"].applications == ("lstm",) and found["gru"].applications == ("gru",)
    assert found["transformer_block"].applications == ("vit", "gpt")
    assert found["attention"].blocks == ("transformer_block", "transformer_encoder_layer")
    assert found["silu"].blocks == ("transformer_block", "transformer_encoder_layer")  # if asked for
    assert found["cross_entropy"].applications == tuple(APPLICATIONS)
    assert found["softmax"].blocks == found["softmax"].applications == ()


# ---- the page


class Reader(HTMLParser):
    """Collects elements, ids, texts and whatever points to another place."""

    def __init__(self):
        super().__init__()
        self.tags, self.ids, self.links, self.open = [], [], [], []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append(tag)
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given[name] for name in ("href", "src", "srcset", "action", "data", "poster") if name in given]


def test_the_page_needs_nothing_else(text):
    reader = Reader()
    reader.feed(text)
    assert all(link.startswith(("#", "data:")) for link in reader.links)
    assert not {"script", "iframe", "img", "object", "embed", "form"} & set(reader.tags)
    assert "url(" not in text and "@import" not in text
    assert """content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">""" in text  # nor would it get any
    namespaces = {"http://www.w3.org/1998/Math/MathML", "http://www.w3.org/2000/svg"}
    assert set(re.findall(r"https?://[^\"'\s<]+", text)) <= namespaces
    assert len(set(reader.ids)) == len(reader.ids)
    assert {link[1:] for link in reader.links if link.startswith("#")} <= set(reader.ids)
    assert set(SPECS) <= set(reader.ids)


def test_the_page_shows_everything_of_every_layer(text, sheets):
    articles = re.findall(r'<article id="(\w+)".*?</article>', text, flags=re.DOTALL)
    assert articles == list(SPECS)
    bodies = dict(zip(articles, re.findall(r"<article.*?</article>", text, flags=re.DOTALL), strict=True))
    for sheet in sheets:
        body = bodies[sheet.spec.name]
        purpose = sheet.spec.purpose[0].upper() + sheet.spec.purpose[1:]
        assert f"<p>{purpose.replace(chr(39), '&#39;')}.</p>" in body
        if sheet.replaces:
            assert f"for {sheet.replaces}" in body
        assert body.count("<svg") == len(sheet.pictures) > 0
        assert body.count("<math") == 1 + bool(sheet.parameters) + len(sheet.growth) + len(sheet.counts)
        used = [BLOCKS[name].layer.__name__ for name in sheet.usage.blocks] + list(sheet.usage.applications)
        assert re.findall(r'class="chip"[^>]*>([^<]+)<', body) == used
        for part in re.findall(r"<svg.*?</svg>|<math.*?</math>", body, flags=re.DOTALL):
            ElementTree.fromstring(part)  # well formed, so that every browser reads the same


def test_formulas_are_those_of_the_docstrings():
    gru = page.formula_of(LAYERS["gru"].layer)
    assert gru.count("<mtr>") == 4 and "<mi>&</mi>" not in gru  # r, z, n and h, each on its line
    assert page.formula_of(LAYERS["dropout"].layer).count("<mtr>") == 2  # y, and how m is drawn
    assert page.formula_of(LAYERS["relu"].layer).count("<mtr>") == 0
    assert page.formula_of(torch.nn.ReLU) == ""


def test_a_page_that_cannot_be_written_leaves_the_old_one(text, sheets, tmp_path, monkeypatch):
    path = tmp_path / "overview.html"
    path.write_text("old")

    def full(*arguments):
        raise OSError("no space left on the device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        page.write_page(path, sheets[:1])
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_command(sheets, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(page, "sheets", lambda: sheets[:3])
    path, folder = tmp_path / "overview.html", tmp_path / "pictures"
    assert cli.main(["layers", "--html", str(path), "--svg", str(folder)]) == 0
    assert capsys.readouterr().out == f"The overview is {path}.\n3 pictures are in {folder}.\n"
    assert path.exists() and len(list(folder.iterdir())) == 3
    assert cli.main(["layers", "--html", str(path / "below.html")]) == 2
    assert cli.main(["layers", "--svg", str(path)]) == 2
    problems = capsys.readouterr().err.splitlines()
    assert len(problems) == 2 and all(line.startswith("nacre: ") for line in problems)


# ---- a browser

MEASURE = """(() => {
const box = one => one.getBoundingClientRect();
const all = kind => [...document.querySelectorAll(kind)];
const inside = kind => all(kind).every(one => box(one).width > 40 && box(one).height > 20
    && box(one).left >= 0 && box(one).right <= innerWidth);
const luminance = colour => colour.match(/[0-9.]+/g).slice(0, 3).map(Number)
    .map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const contrast = (one, other) => { const [a, b] = [luminance(one), luminance(other)];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); };
const paper = getComputedStyle(document.querySelector("article")).backgroundColor;
const readable = (kind, property) => all(kind).every(one => contrast(getComputedStyle(one)[property], paper) >= 4.5);
return {
    width: innerWidth, overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    articles: all("article").length, svg: all("svg").length, pictures: inside("svg"),
    math: all(".formula math").every(one => box(one).width > 20 && box(one).height > 10),
    text: readable("h2, p, dt, dd, figcaption, a.chip", "color"), labels: readable("svg text", "fill"),
    dark: luminance(paper) < 0.1,
};
})()"""


@pytest.mark.skipif(browser.find() is None, reason="a browser, Debian's chromium, is not installed")
@pytest.mark.parametrize(("width", "dark"), [(1400, False), (390, True)], ids=["wide", "a phone, dark"])
def test_in_a_browser(text, sheets, tmp_path, width, dark):
    """Laid out within the window, in readable colours, with no request but for the page and nothing on the console."""
    path = tmp_path / "overview.html"
    path.write_text(text, encoding="utf-8")
    opened = browser.Page(path, tmp_path / "browser", width)
    try:
        opened.dark(dark)
        found = opened.run(MEASURE)
    finally:
        opened.close()
    expected = {"articles": len(sheets), "svg": sum(len(sheet.pictures) for sheet in sheets), "dark": dark}
    readable = {"overflow": 0, "pictures": True, "math": True, "text": True, "labels": True}
    assert found == {"width": width, **readable, **expected}
    assert [url for url in opened.requests if not url.startswith("data:")] == [path.as_uri()]
    assert opened.said == []
