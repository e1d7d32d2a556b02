"""nacre bench --growth, --training and --vocabulary: right numbers, and no time for a wrong result."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import nacre
from nacre.cli import main
from nacre.tools.bench import command, comparing, growth, machine, memory, training, vocabulary, worker
from nacre.tools.bench.results import NACRE, TORCH, Ceilings, Row, Side
from nacre.tools.bench.study import Options

MODULES = {"growth": growth, "training": training, "vocabulary": vocabulary}
TEXT = "to be, or not to be, that is the question: " * 60


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """The jobs of the child processes done here, on small sizes."""

    def run_job(job, environment):
        yield from worker.jobs(json.loads(json.dumps(job)))

    for module in MODULES.values():
        monkeypatch.setattr(module, "run_job", run_job)
    for module in (comparing, growth, vocabulary):
        monkeypatch.setattr(module, "apart", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(growth, "measured_ceilings", lambda settings: Ceilings(1e11, 1e10))
    monkeypatch.setattr(growth, "TOKENS", (4, 8))
    monkeypatch.setattr(training, "RUNS", (("tiny", SIZES), ("tiny", {**SIZES, "dropout": 0.1})))
    for name, size in (("FEATURES", 6), ("CLASSES", 40), ("TOKENS", 5)):
        monkeypatch.setattr(vocabulary, name, size)
    monkeypatch.setattr(command, "describe_machine", lambda settings: (machine.describe(), []))


SIZES = {"width": 16, "depth": 1, "heads": 2, "block": 16}
QUICK = ["--rounds", "1", "--seconds", "0.001"]


@pytest.mark.parametrize("name", MODULES)
def test_a_study_prints_and_writes(name, tmp_path, capsys):
    data = tmp_path / "text"
    data.write_text(TEXT)
    given = ["--steps", "3", "--data", str(data)] if name == "training" else QUICK
    assert main(["bench", f"--{name}", *given, "--out", str(tmp_path / "out")]) == 0
    study = MODULES[name].STUDY
    found = json.loads((tmp_path / "out" / f"{name}.json").read_text())
    assert len(found["rows"]) == {"growth": 4, "training": 2, "vocabulary": len(vocabulary.HEADS)}[name]
    written = (tmp_path / "out" / f"{name}.md").read_text()
    tables = [line for line in written.splitlines() if line.startswith("|")]
    assert all(line.count("|") in {len(MODULES[name].HEADINGS) + 1} for line in tables)
    assert torch.__version__ in capsys.readouterr().out and "WRONG" not in written
    pictures = list((tmp_path / "out").glob("*.png"))
    assert bool(pictures) == (study.panels is not None)
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--growth", "layer_norm"], "--growth takes no names of layers; got layer_norm"),
        (["--training", "--steps", "0"], "steps of a training must be at least 1; got 0"),
        (["--training", "--data", "missing"], "missing"),
    ],
)
def test_what_a_study_cannot_do_is_said(arguments, message, tmp_path, capsys):
    assert main(["bench", *arguments, "--out", str(tmp_path / "none")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


# ---- growth


def test_the_fitted_power_of_a_power():
    sizes = [256, 512, 1024, 2048]
    assert growth.exponent(sizes, [3 * n**2 for n in sizes]) == pytest.approx(2)
    assert growth.exponent(sizes, [7 * n for n in sizes]) == pytest.approx(1)


def growth_row(tokens, **problem):
    sides = {TORCH: Side(seconds=tokens**2 * 1e-6), NACRE: Side(**(problem or {"seconds": tokens**2 * 5e-7}))}
    times = Row("attention", "", "", "", "default", "", 1, 1, 1.0, 1e-9, sides)
    needed = {TORCH: growth.Memory(tokens**2, tokens**2 * 2), NACRE: growth.Memory(tokens * 8, tokens * 16)}
    return growth.GrowthRow(tokens, 0.1, times, needed)


def test_powers_stand_below_the_table_and_wrong_times_are_not_fitted():
    (table,) = growth.tables([growth_row(tokens) for tokens in (256, 512, 1024)])
    assert table.notes == [
        "time: n^2.00 by torch.nn, n^2.00 by nacre",
        "memory kept for the backward: n^2.00 by torch.nn, n^1.00 by nacre",
        "peak memory: n^2.00 by torch.nn, n^1.00 by nacre",
    ]
    wrong = growth_row(1024, problem="off", wrong=True)
    (table,) = growth.tables([growth_row(256), growth_row(512), wrong])
    assert wrong.wrong and table.rows[2][2] == "WRONG" and table.rows[2][3] == ""
    assert table.notes[0] == "time: n^2.00 by torch.nn, n^2.00 by nacre"
    assert table.notes[-1] == "1024 tokens, dropout 0.1, nacre: WRONG: off"


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_attention_keeps_is_its_bill(dropout):
    needed = growth.memory_of(64, dropout, NACRE)
    layer = nacre.MultiheadAttention(**growth._SIZES, dropout=dropout)
    tokens = torch.randn(1, 64, 128, requires_grad=True)
    assert needed.saved == nacre.cost(layer, tokens, tokens, tokens, need_weights=False).saved_bytes


# ---- memory


def test_saved_storages_count_once_and_parameters_do_not():
    layer = nn.Sequential(nn.Linear(8, 8), nn.Sigmoid(), nn.Sigmoid())
    x = torch.randn(4, 8, requires_grad=True)
    # the input, and the output of each sigmoid
    assert memory.saved_bytes(layer, lambda: layer(x)) == 3 * 4 * 8 * 4
    assert memory.saved_bytes(nn.Identity(), lambda: x * x) == 4 * 8 * 4


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="reads Linux's /proc")
def test_the_peak_is_seen_though_it_is_given_back():
    # in a process of its own: this one's heap may have room from before
    code = (
        "import torch; from nacre.tools.bench.memory import peak_bytes\n"
        "print(peak_bytes(lambda: torch.ones(2**24).sum()), peak_bytes(lambda: None))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    peak, nothing = map(int, printed.split())
    # pages that the kernel counts late, and what the first sum loads
    assert 2**26 <= peak < 2**26 + 2**24
    assert nothing < 2**20


# ---- training


def test_curves_that_differ_are_wrong_and_have_no_times(monkeypatch, tmp_path):
    real = training.convert

    def changed(model, to):
        real(model, to=to)
        with torch.no_grad():
            model.norm.weight.mul_(2)

    monkeypatch.setattr(training, "convert", changed)
    data = tmp_path / "text"
    data.write_text(TEXT)
    rows = training.run(Options(steps=4, data=data), lambda row: None)
    assert [row.dropout for row in rows] == [0.0]  # with dropout it is not even run
    assert rows[0].wrong and rows[0].difference > training.AGREEMENT
    (table,) = training.tables(rows)
    assert table.rows[0][3:8] == ["WRONG"] * 5
    assert "the losses differ" in table.notes[0]


def test_both_sides_have_the_same_optimizer_and_see_the_same_data(tmp_path):
    data = tmp_path / "text"
    data.write_text(TEXT)
    first, with_dropout = training.run(Options(steps=12, data=data), lambda row: None)
    assert first.difference < 1e-5  # float32 rounding over few steps
    assert first.losses[TORCH][-1] < first.losses[TORCH][0]
    assert with_dropout.difference is None and not with_dropout.wrong
    assert all(len(values) == 12 for values in first.seconds.values())
    optimizer = training.Training(training.build("gpt", data=str(data), **SIZES)).optimizer
    assert isinstance(optimizer, torch.optim.AdamW) and all(group["fused"] for group in optimizer.param_groups)


def test_a_loss_that_is_no_number_does_not_agree():
    assert math.isnan(training.largest_difference([1.0, 2.0, 1.0], [1.5, math.nan, 1.0]))
    row = training.TrainingRow("gpt", {}, {}, {TORCH: [1.0], NACRE: [math.nan]})
    assert row.wrong


# ---- vocabulary


def test_a_head_with_wrong_gradients_is_not_timed(monkeypatch):
    class Halved(vocabulary.Separate):
        def forward(self, input, target):
            return super().forward(input * 0.5, target)

    monkeypatch.setitem(vocabulary.HEADS, NACRE, Halved)
    rows = vocabulary.run(Options(rounds=1, seconds=0.001), lambda row: None)
    wrong = rows[-1]
    assert wrong.side == NACRE and wrong.wrong and wrong.seconds is None
    assert all(not row.wrong and row.seconds > 0 for row in rows[:-1])
    (table,) = vocabulary.tables(rows)
    assert table.rows[-1][1] == "WRONG" and "WRONG: output" in table.notes[0]


def test_memory_beside_the_gradients():
    rows = [
        vocabulary.HeadRow(vocabulary.SEPARATE, 1.0, peak=1000 * 2**20, gradients=200 * 2**20),
        vocabulary.HeadRow(NACRE, 1.0, peak=300 * 2**20, gradients=200 * 2**20),
        vocabulary.HeadRow("unseen", 1.0, peak=None, gradients=200 * 2**20),
    ]
    assert [row.extra for row in rows] == [800 * 2**20, 100 * 2**20, None]
    (table,) = vocabulary.tables(rows)
    assert [row[4:] for row in table.rows] == [["800 MiB", "1/1.0"], ["100 MiB", "1/8.0"], ["", ""]]
