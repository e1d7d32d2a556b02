"""The page of a bill, in a real browser."""

import json

import pytest
import torch
from torch import nn

from nacre.tools.cost import ceilings, cost
from tests.tools import browser
from tests.tools.cost_support import SPEEDS

pytest.importorskip("plotly")
pytest.importorskip("latex2mathml")


class Wide(nn.Module):
    """Three layers, of which the second has most parameters, beside a function."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 32), nn.Linear(32, 2))

    def forward(self, x):
        return self.body(x) @ x[:2, :2]


@pytest.fixture
def written(tmp_path, monkeypatch):
    monkeypatch.setattr(ceilings, "machine_speeds", lambda needed: SPEEDS)
    report = cost(Wide(), torch.randn(10, 8), measure=True)
    path = tmp_path / "bill.html"
    report.html(path)
    return path


@pytest.fixture
def page(written, tmp_path):
    if browser.find() is None:
        pytest.skip("no chromium")
    opened = browser.Page(written, tmp_path / "browser")
    yield opened
    opened.close()


VISIBLE = "[...document.querySelectorAll('#rows tbody tr')].filter(row => row.offsetParent).map(row => row.dataset.row)"
HEADING = "[...document.querySelectorAll('#rows th button')].find(button => button.dataset.key === '%s').click()"


def test_the_page_folds_sorts_draws_and_asks_for_nothing(page, written):
    assert page.run("document.title") == "Wide: what it costs"
    assert page.run(VISIBLE) == ["0", "1", "2", "3", "4"]
    # parameters: 36, 160 and 66
    page.run(HEADING % "parameters")
    assert page.run(VISIBLE) == ["0", "1", "3", "4", "2"]
    page.run(HEADING % "parameters")
    assert page.run(VISIBLE) == ["0", "1", "2", "4", "3"]
    assert page.run("document.querySelector('th[aria-sort=ascending]').textContent.trim()") == "parameters"
    page.run("document.querySelector('tr[data-row=\"1\"] button').click()")
    assert page.run(VISIBLE) == ["0", "1"]
    page.run(HEADING % "name")
    assert page.run(VISIBLE) == ["0", "1"]  # what is folded stays folded
    page.run("document.getElementById('unfold').click()")
    assert page.run(VISIBLE) == ["0", "1", "4", "3", "2"]
    page.run("document.getElementById('fold').click()")
    assert page.run(VISIBLE) == ["0", "1"]
    assert page.run("document.querySelectorAll('#parts .slice').length") == 5
    assert (
        page.run("document.querySelectorAll('#roofline .point').length") == 3
    )  # three layers; the function beside them is not timed alone
    for form in ("icicle", "treemap"):
        page.run(f"document.getElementById('form').value = '{form}'")
        page.run("document.getElementById('form').dispatchEvent(new Event('change'))")
        assert page.run("document.getElementById('parts').data[0].type") == form
    page.run("document.getElementById('measure').value = 'parameters'")
    page.run("document.getElementById('measure').dispatchEvent(new Event('change'))")
    assert page.run("document.getElementById('parts').data[0].values") == [0, 0, 36, 160, 66]
    assert page.run("[...document.querySelectorAll('h3')].map(heading => heading.textContent)") == ["Linear"]
    # 2 N D E, as a browser sets it
    assert page.run("document.querySelectorAll('math').length") >= 4
    assert page.run("document.querySelectorAll('math')[1].textContent.replace(/\\s/g, '')") == "2NDE"
    light = page.run("getComputedStyle(document.body).backgroundColor")
    page.dark(True)
    assert page.run("getComputedStyle(document.body).backgroundColor") != light
    assert page.said == []
    assert {url for url in page.requests if not url.startswith(("data:", "blob:"))} == {written.as_uri()}


def test_a_phone_need_not_scroll_the_page_sideways(written, tmp_path):
    if browser.find() is None:
        pytest.skip("no chromium")
    page = browser.Page(written, tmp_path / "browser", width=390)
    try:
        assert page.run("document.documentElement.scrollWidth") <= 390
    finally:
        page.close()


def test_a_sheet_of_paper_is_light_and_shows_all(page):
    page.dark(True)
    page.run("document.getElementById('fold').click()")
    page.prints(680)  # A4 between its margins
    assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.run("getComputedStyle(document.querySelector('.tile')).backgroundColor") == "rgb(244, 246, 249)"
    assert page.run(VISIBLE) == ["0", "1", "2", "3", "4"]  # what is folded too
    assert page.run("document.documentElement.scrollWidth") <= 680
    charts = "[...document.querySelectorAll('.chart')].map(chart => chart.querySelector('svg').getBoundingClientRect())"
    assert page.run(f"{charts}.every(chart => chart.right <= 680 && chart.width > 600)")
    page.run("dispatchEvent(new Event('afterprint'))")


def test_what_the_letters_of_formulas_stand_for(page):
    # N = 10 rows in each call of the three layers
    sizes = page.run("[...document.querySelectorAll('.sizes li')].map(line => line.textContent.trim())")
    assert sizes == [
        "N = 10, D = 8, E = 4 in body.0",
        "N = 10, D = 4, E = 32 in body.1",
        "N = 10, D = 32, E = 2 in body.2",
    ]


def test_names_are_text_and_the_file_is_whole_or_not_there(tmp_path, monkeypatch):
    class Strange(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("</script><b>", nn.Linear(2, 2))

        def forward(self, x):
            return next(self.children())(x)

    report = cost(Strange(), torch.zeros(1, 2))
    report.html(tmp_path / "bill.html")
    text = (tmp_path / "bill.html").read_text()
    data = text.split('<script id="data" type="application/json">')[1].split("</script>")[0]
    assert json.loads(data)["rows"][1]["name"] == "</script><b>"
    assert "<b></td>" not in text and "&lt;/script&gt;&lt;b&gt;" in text
    monkeypatch.setattr("nacre.tools.cost.page.get_plotlyjs", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report.html(tmp_path / "other.html")
    assert [path.name for path in tmp_path.iterdir()] == ["bill.html"]
