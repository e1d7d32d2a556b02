"""Predicted times: their parts, the tables they come from, and the file that keeps these."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from nacre.cli import main
from nacre.tools.cost import ceilings, cost, models, predictions, probes, speed
from nacre.tools.cost.distances import Done, Freed, Taken, with_distances
from nacre.tools.cost.grid import LONG, Grid, measured
from nacre.tools.cost.heap import LARGEST_KEPT, Heap
from nacre.tools.cost.models import MODELS
from nacre.tools.cost.operators import Work
from nacre.tools.cost.predictions import Checked, check, markdown
from nacre.tools.cost.tables import COPY, PROBES, SAME
from tests.tools.cost_support import SPEEDS

ADD = Work(kind="aten::add", sizes=(1000,), bytes=1000)


def test_the_time_of_a_call():
    # 1,000 bytes at a million a second, and a call of an operator of torch
    assert SPEEDS.seconds(ADD, False) == pytest.approx(1e-3 + 1e-3)
    assert SPEEDS.seconds(ADD, True) == pytest.approx(1e-3 + 2e-3)
    # a million FLOPs at a billion a second, and a call of one of nacre's
    product = Work(kind="nacre::linear", sizes=(10, 100, 500), flops=10**6, bytes=8, own=True)
    assert SPEEDS.seconds(product, False) == pytest.approx(1e-3 + 5e-3)
    # from 2 ** 20 bytes away at a million bytes a second, where 1,000 bytes are near: about ten million
    far = replace(ADD, distances=((2**20, 500),))
    assert SPEEDS.seconds(far, False) == pytest.approx(2e-3 + 500 * (1e-6 - 1e-7), rel=1e-2)
    assert SPEEDS.seconds(replace(ADD, distances=((2**4, 500),)), False) == SPEEDS.seconds(ADD, False)
    assert SPEEDS.seconds(replace(ADD, fresh=100), False) == pytest.approx(2e-3 + 100e-6)
    assert SPEEDS.seconds(Work(kind="view"), True) == 2e-5


def test_kinds_without_a_table():
    unknown = replace(ADD, kind="aten::_nobody_knows_it", bytes=2000)
    assert speed.kind_of_table(unknown) == COPY and SPEEDS.seconds(unknown, False) == pytest.approx(2e-3 + 1e-3)
    assert speed.kind_of_table(replace(unknown, pointwise=True)) == "aten::mul"
    assert set(SAME.values()) <= set(PROBES)
    # one that does not run on this machine takes as long as a copy
    absent = {"float32": {**SPEEDS.grids["float32"], "aten::add": None}}
    assert replace(SPEEDS, grids=absent).seconds(ADD, False) == SPEEDS.seconds(ADD, False)


def test_a_table_between_its_points_and_beyond():
    grid = Grid(((1, 100), (1, 10)), (1.0, 2.0, 100.0, 200.0), (1.0, 10.0, 100.0, 1000.0))
    assert grid.at((10, 1), 10.0) == pytest.approx(10.0)
    assert grid.at((100, 20), 2000.0) == pytest.approx(400.0)  # beyond the last point in proportion
    assert grid.at((100, 10), 500.0) == pytest.approx(100.0)  # half the work that the sizes say
    times = [grid.at((size, 3), 3.0 * size) for size in range(1, 1000)]
    assert all(one <= other * (1 + 1e-12) for one, other in itertools.pairwise(times))


def test_what_takes_long_is_not_measured():
    asked = []

    def measure(point):
        asked.append(point)
        seconds = LONG * math.prod(point) / 50
        found = {"slow": (seconds, math.prod(point)), "not everywhere": (1e-9, 1.0)}
        return found if point == (1, 1) else {"slow": found["slow"]}

    grids = measured(((1, 10, 100), (1, 10)), measure)
    assert set(grids) == {"slow"}
    assert (100, 10) not in asked and (100, 1) not in asked and (1, 10) in asked
    assert grids["slow"].at((100, 10), 1000.0) == pytest.approx(LONG * 20)


def log(size=100, own=False):
    """One tensor is made, read again after another of the same size was made and let go, and let go itself."""
    return [
        Taken(1, size, own),
        Done(0, ADD, ((1, size),)),
        Taken(2, size, own),
        Done(1, ADD, ((2, size),)),
        Freed(2),
        Done(2, ADD, ((1, size),)),
        Freed(1),
    ]


def test_distances():
    done = with_distances(log())
    # the first tensor lies where it, or the second, lay in the step before; between the writing and the reading of it
    # 100 bytes were touched, which lie below 128
    assert done[2].distances == ((128, 100),)
    assert all(sum(size for _, size in work.distances) == 100 and not work.fresh for work in done.values())
    assert [replace(work, distances=()) for work in done.values()] == [ADD] * 3


def test_large_blocks_are_fresh_but_for_those_of_nacre():
    size = 2 * LARGEST_KEPT
    done = with_distances(log(size))
    assert [work.fresh for work in done.values()] == [size, size, 0]
    assert [work.distances for work in done.values()] == [(), (), ((2 * size, size),)]  # a fresh page was never away
    assert not any(work.fresh for work in with_distances(log(size, own=True)).values())


def test_the_heap():
    heap = Heap()
    first, second, third = (heap.take(size)[0] for size in (64, 100, 64))
    assert (first, second, third) == (0, 64, 192)  # in units of 64 bytes
    heap.give(first, 64, 1)
    heap.give(second, 100, 2)
    assert heap.take(192) == (0, 2)  # neighbours were joined
    heap.give(0, 192, 3)
    one, other = heap.take(64)[0], heap.take(128)[0]
    heap.give(other, 128, 3)
    heap.give(one, 64, 3)
    assert heap.take(192) == (0, 3)  # in this order too
    heap.give(0, 192, 3)
    assert heap.take(64) == (0, 3) and heap.take(128) == (64, 3) and heap.take(64) == (256, None)


def predicted(model: nn.Module, *shape: int):
    report = cost(model, torch.zeros(shape))
    speed.predict(report, SPEEDS)
    return report


def test_predictions_add_up():
    model = nn.Sequential(nn.Linear(500, 500, bias=False), nn.Linear(500, 500, bias=False))
    report = predicted(model, 100, 500)
    total, first, second = (row.predicted_seconds for row in report.rows)
    # what no row within has is the call of the model, the start of the backward and where parameters take gradients
    taken = sum(count * SPEEDS.seconds(work, True) for work, count in report.rows[0].backward_work.items())
    assert taken < 1e-3 and total == pytest.approx(first + second + 1e-4 + 3e-3 + taken) == report.predicted_seconds
    # traffic decides: forward 100 x 500 in and out and 500 x 500 weights, at 1e6 bytes a second
    assert report.rows[1].limit_seconds == pytest.approx(1.4 + report.rows[1].own.backward_bytes / 1e6)
    assert "to be expected" in report.table() and report.to_json()["predicted_seconds"] == total
    assert predicted(model, 100, 500).predicted_seconds == total


@pytest.mark.parametrize("build", [models._lenet, lambda: nn.Sequential(nn.LSTM(8, 8))], ids=["LeNet", "LSTM"])
def test_a_larger_batch_takes_longer(build):
    shape = (28, 28) if build is models._lenet else (8,)
    times = [predicted(build(), batch, 1, *shape).predicted_seconds for batch in (1, 2, 3, 8, 64)]
    assert times == sorted(times) and times[-1] > times[0]


def test_what_is_frozen_takes_no_backward():
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300))
    whole = predicted(model, 50, 300).predicted_seconds
    assert predicted(model.requires_grad_(False), 50, 300).predicted_seconds < whole / 2


def test_every_probe_finds_its_kinds(monkeypatch):
    monkeypatch.setattr(probes, "SECONDS", 0.0)
    for probe in set(PROBES.values()):
        small = replace(probe, axes=tuple(axis[:2] if len(axis) > 2 else axis[:1] for axis in probe.axes))
        grids = small.grids(torch.float32)
        assert set(grids) == set(probe.kinds)
        for kind, grid in grids.items():
            assert all(math.isfinite(one) and one > 0 for one in (*grid.seconds, *grid.amounts)), kind


SMALL = ("LeNet", "GPT of characters", "GRU both ways, 32x40 tokens, nacre", "autoencoder")


def test_products_have_tables():
    """And as many sizes as these have axes."""
    for one in MODELS:
        if not one.name.startswith(SMALL):
            continue
        model, x = one.build()
        for row in cost(model, x).rows:
            for work in (*row.forward_work, *row.backward_work):
                assert not work.flops or speed.kind_of_table(work) != COPY, (one.name, work.kind)
                assert (
                    work.kind == "view"
                    or not work.flops
                    or len(work.sizes) == len(PROBES[speed.kind_of_table(work)].axes)
                )


NEEDED = {"float32": {COPY, "aten::sum"}}


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """Measures little, on a machine where nobody else works, and keeps the file in an empty folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    monkeypatch.setattr(probes, "SECONDS", 0.0)
    for name, value in (("SIDE", 8), ("SIZES", (2**12,)), ("FRESH", 2**12), ("_CHAIN", 2), ("other_load", lambda: 0.0)):
        monkeypatch.setattr(ceilings, name, value)


def test_speeds_are_measured_once_and_a_damaged_file_anew(quick):
    first = ceilings.machine_speeds(NEEDED)
    assert ceilings.machine_speeds(NEEDED) == first  # times differ from one measurement to the next
    path = ceilings.cache_file()
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    good = path.read_text()
    values = json.loads(good)
    table = values["grids"]["float32"][COPY]
    for damaged in (
        "",
        "{",
        "[]",
        "[" * 100_000,
        "\0",
        good.replace('"fresh": ', '"fresh": -'),
        good.replace('"fresh": ', '"fresh": 1e999'),
        json.dumps({**values, "copies": {}}),
        json.dumps({**values, "calls": {}}),
        json.dumps({**values, "grids": {"float32": {COPY: {**table, "seconds": [1]}}}}),
        json.dumps({**values, "grids": {"float32": {COPY: {**table, "axes": [[2, 1]]}}}}),
        json.dumps({**values, "grids": {"float32": {COPY: {"axes": [[1]], "seconds": [1], "amounts": [1]}}}}),
    ):
        path.write_text(damaged)
        assert ceilings.machine_speeds(NEEDED).fresh > 0
        assert speed.Speeds.from_json(json.loads(path.read_text())).grids["float32"][COPY].axes == PROBES[COPY].axes


def test_what_is_missing_is_measured_beside_what_is_known(quick):
    first = ceilings.machine_speeds(NEEDED)
    both = ceilings.machine_speeds({"float64": {COPY}, "float32": {"aten::cat"}})
    assert set(both.grids) == set(both.best) == {"float32", "float64"} and both.copies == first.copies
    assert both.grids["float32"].items() > first.grids["float32"].items()
    assert ceilings.machine_speeds(NEEDED) == both


def test_what_was_measured_in_company_is_not_kept(quick, monkeypatch):
    monkeypatch.setattr(ceilings, "other_load", lambda: 1.0)
    assert "not quiet" in ceilings.machine_speeds(NEEDED).warnings[0] and not ceilings.cache_file().exists()


def test_speeds_without_a_place_to_keep_them(quick, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "file"))
    assert ceilings.machine_speeds(NEEDED).fresh > 0


def test_the_check(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(ceilings, "machine_speeds", lambda needed: SPEEDS)
    monkeypatch.setattr(predictions, "SECONDS", 0.0)
    monkeypatch.setattr(models, "MODELS", MODELS[:1])
    told = []
    (one,) = check(MODELS[:1], told.append)
    assert told == [one.name] == [MODELS[0].name] and one.predicted > 0 and one.measured > 0
    path = tmp_path / "checked.json"
    assert main(["cost", "--check-predictions", "--json", str(path)]) == 0
    assert f"| {one.name} |" in capsys.readouterr().out and json.loads(path.read_text())[0]["name"] == one.name
    assert main(["cost"]) == 2 and "--check-predictions" in capsys.readouterr().err
    assert main(["cost", "gpt", "--check-predictions"]) == 2 and "models of its own" in capsys.readouterr().err


def test_the_table_of_the_check():
    rows = [Checked("one", 0.09, 0.1), Checked("other", 0.13, 0.1), Checked("third", 0.1, 0.1)]
    text = markdown(rows)
    assert "| one | 90 ms | 100 ms | -10 % |" in text and "| other | 130 ms | 100 ms | +30 % |" in text
    assert text.endswith("Median error 10 %, largest 30 % (other).")
