"""nacre cost on the command line: targets, files, comparison, and one clear line for whatever is wrong."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nacre.cli import main
from nacre.tools.convert import convert
from nacre.tools.cost import ceilings, compare, cost
from nacre.tools.cost.target import usual_inputs
from tests.tools.cost_support import SPEEDS

MODELS = """
import torch
from torch import nn

model = nn.Linear(6, 4)
number = 3

def small():
    return nn.Sequential(nn.Linear(6, 4), nn.ReLU())

def large():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))

def wrong():
    return 3

def broken():
    raise RuntimeError("no weights here\\nand more")

def leaves():
    raise SystemExit(3)

def lazy():
    return nn.LazyLinear(3)

class two(nn.Module):
    def forward(self, x, other):
        return x + other

class interrupted(nn.Module):
    calls = 0

    def forward(self, x):
        interrupted.calls += 1
        if interrupted.calls > 1:
            raise KeyboardInterrupt
        return x * 2

class recursive(nn.Module):
    def forward(self, x):
        return self.forward(x)

class Decides(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return self.layer(x) if x.sum() > x.max() + 1e9 else self.layer(self.layer(x))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "their_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("their_models", None)


def run(capsys, *arguments):
    status = main(["cost", *arguments])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_a_function_that_makes_a_model(folder, capsys):
    status, out, _ = run(capsys, "their_models:small", "--input", "10x6", "--json", "bill.json")
    assert status == 0 and "480 forward, 480 backward" in out  # 2 * 10 * 6 * 4; the input needs no gradient
    assert json.loads((folder / "bill.json").read_text())["flops"] == 480
    assert run(capsys, "their_models:model", "--input", "10x6", "--eval")[1].count("480 forward, 0 backward") == 1
    assert "480 forward" in run(capsys, "their_models:model", "--input", "10x6", "--dtype", "bfloat16")[1]
    # two layers, since the sum is never so large: what decides by values runs on real numbers
    assert "1,440 forward" in run(capsys, "their_models:Decides", "--input", "10x6")[1]


def test_an_application(capsys):
    status, out, _ = run(capsys, "gpt", "--tokens", "2x16", "--depth", "1")
    # 4 blocks of 12 D^2 weights and 2 D of norms, D = 128; embeddings of 96 characters and 64 positions; a last norm
    assert status == 0 and f"{4 * (12 * 128**2 + 2 * 128) + (96 + 64) * 128 + 128:,}" in out


def test_two_bills(folder, capsys):
    status, out, _ = run(
        capsys, "their_models:small", "--input", "10x6", "--against", "their_models:large", "--json", "both.json"
    )
    assert status == 0 and "480 -> 2,240" in out  # 2 * 10 * (6 * 8 + 8 * 8)
    rows = {row["name"]: row for row in json.loads((folder / "both.json").read_text())["rows"]}
    assert list(rows) == ["", "0", "1", "2"]
    assert rows["0"]["difference"]["flops"] == 480 and rows["2"]["in_one"] is False
    assert rows[""]["difference"]["parameters"] == 8 * 6 + 8 + 8 * 8 + 8 - 28
    out = run(capsys, "their_models:small", "--input", "10x6", "--against", "nacre")[1]
    assert "nacre.Linear" in out and "480 -> 480" in out
    one = cost(nn.Linear(2, 2), torch.zeros(1, 2))
    assert compare(one, cost(nn.Sequential(), torch.zeros(1, 2))).to_json()["rows"][0]["difference"]["flops"] == -8


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gtp"], "Did you mean gpt?"),
        (["their_models:"], "a factory is package.module:name; got 'their_models:'. As in my_models:small"),
        (["their_models.py:small"], "named by its module, not by a file; got 'their_models.py:small'. Did you mean"),
        (["their_models:small", "--tokens", "2x6"], "the same dtype, but these have torch.float32 and torch.int64"),
        (["their_models:small", "--input", f"{10**23}x6"], "an input has at most 281,474,976,710,656 numbers"),
        (["their_models:small", "--input", "=2x6"], "or one with a name, as ids=4x512; got '=2x6'"),
        (
            ["their_models:two", "--input", "x=2x6"],
            "missing 1 required positional argument: 'other'. Its forward takes",
        ),
        (["nowhere:model", "--input", "2x3"], "nowhere cannot be imported: ModuleNotFoundError"),
        (["their_models:smal", "--input", "2x6"], "Did you mean 'small'?"),
        (["their_models:number", "--input", "2x6"], "must be a model or make one; got a int"),
        (["their_models:wrong", "--input", "2x6"], "must return a torch.nn.Module; got a int"),
        (["their_models:broken", "--input", "2x6"], "could not be built: RuntimeError: no weights here"),
        (["torch.nn:Linear", "--input", "2x6"], "is called without arguments"),
        (["their_models:small"], "Give the shape of each: --input 8x3x32x32"),
        (["their_models:small", "--input", "2x"], "whole numbers from 1 on"),
        (["their_models:small", "--input", "2x0"], "whole numbers from 1 on"),
        (["their_models:small", "--input", "2x7"], "cannot be called with these inputs; got inputs of shape (2, 7)"),
        (["missing.json"], "a configuration is a file that is there; got missing.json. Give"),
        ([".json"], "a configuration is a file that is there; got .json. Give"),
        (["their_models:leaves", "--input", "2x6"], "could not be built: SystemExit: 3"),
        (["their_models:two", "--input", "2x6"], "missing 1 required positional argument: 'other'. Its forward takes"),
        (["their_models:recursive", "--input", "2x6"], "maximum recursion depth exceeded"),
        (["their_models:lazy", "--input", "2x6"], "weight without a shape. Call the model once on real inputs first."),
        (
            ["their_models:small", "--input", "2x6", "--json", "."],
            "files are written where a file may be; got ., a folder.",
        ),
        (["damaged.json"], "damaged.json is no JSON"),
        (["other.json"], "says what it is of by model_type"),
        (["their_models:small", "--input", "2x6", "--json", "no/where.json"], "folders that are there"),
    ],
)
def test_whatever_is_wrong_is_said_in_one_line(folder, capsys, arguments, said):
    (folder / "damaged.json").write_text('{"model_type": ')
    (folder / "other.json").write_text("[1]")
    before = sorted(path.name for path in folder.iterdir())
    status, out, err = run(capsys, *arguments)
    assert status == 2 and not out
    assert said in err and len(err.strip().splitlines()) == 1 and "Traceback" not in err
    assert sorted(path.name for path in folder.iterdir() if path.name != "__pycache__") == before


def test_inputs_by_name(folder, capsys):
    assert "12 and 0 on single" in run(capsys, "their_models:two", "--input", "other=2x6", "--input", "x=2x6")[1]


def test_an_interrupted_measurement_leaves_nothing_behind(folder, capsys, monkeypatch):
    monkeypatch.setattr(ceilings, "machine_speeds", lambda needed: SPEEDS)
    files = "--html", "bill.html", "--json", "bill.json"
    status, out, err = run(capsys, "their_models:interrupted", "--input", "2x6", "--measure", *files)
    assert status == 130 and not out
    assert err.strip().splitlines()[-1] == "nacre: interrupted" and "Traceback" not in err
    assert not [path for path in folder.iterdir() if "bill" in path.name]


def test_a_depth_is_a_whole_number(folder, capsys):
    for depth in ("-1", "a"):
        with pytest.raises(SystemExit):
            main(["cost", "their_models:small", "--input", "2x6", "--depth", depth])
        assert f"a whole number from 0 on; got {depth}" in capsys.readouterr().err


def test_the_usual_inputs_of_configurations():
    class Text:
        main_input_name = "input_ids"

        def forward(self, input_ids, decoder_input_ids=None):
            pass

    class Image(Text):
        main_input_name = "pixel_values"

    class Both(Text):
        def forward(self, input_ids, pixel_values=None):
            pass

    class Sound(Text):
        main_input_name = "input_features"

    plain = SimpleNamespace()
    assert [one.lengths for one in usual_inputs(plain, Text)] == [(1, 128)]
    two = usual_inputs(SimpleNamespace(is_encoder_decoder=True), Text)
    assert [(one.name, one.tokens) for one in two] == [("input_ids", True), ("decoder_input_ids", True)]
    assert usual_inputs(plain, Image)[0].lengths == (1, 3, 224, 224)
    assert usual_inputs(SimpleNamespace(image_size=[32, 48], num_channels=1), Image)[0].lengths == (1, 1, 32, 48)
    both = usual_inputs(SimpleNamespace(vision_config=SimpleNamespace(image_size=56)), Both)
    assert [(one.name, one.lengths) for one in both] == [("input_ids", (1, 128)), ("pixel_values", (1, 3, 56, 56))]
    assert usual_inputs(plain, Sound) == ()


def test_debug_shows_where(folder, capsys):
    status, _, err = run(capsys, "their_models:broken", "--input", "2x6", "--debug")
    assert status == 2 and "Traceback" in err and "no weights here" in err


def test_configurations(folder, capsys):
    pytest.importorskip("transformers")
    (folder / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}')
    assert "124,439,808" in run(capsys, "config.json", "--depth", "0")[1]
    (folder / "config.json").write_text('{"model_type": "gtp2"}')
    assert "Did you mean 'gpt2'?" in run(capsys, "config.json")[2]


def test_a_configuration_without_transformers(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    status, _, err = run(capsys, "config.json")
    assert status == 2 and "pip install 'nacre[transformers]'" in err


def test_measured_times(monkeypatch, capsys, folder):
    monkeypatch.setattr(ceilings, "machine_speeds", lambda needed: SPEEDS)
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    report = cost(model, torch.randn(10, 6), measure=True)
    for row in report.rows:
        assert row.measured_forward_seconds > 0 and row.measured_backward_seconds > 0
        assert row.share_of_limit == row.limit_seconds / row.measured_seconds
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert "of limit" in report.table() and report.to_json()["measured_seconds"] == report.rows[0].measured_seconds
    # what nacre.convert would win, by the same measure; the model is not converted
    assert [type(layer) for layer in model] == [nn.Linear, nn.BatchNorm1d, nn.Linear]
    assert report.to_json()["converted_seconds"] == report.converted_seconds > 0
    assert " with nacre.convert: " in report.table()
    converted = cost(convert(model), torch.randn(10, 6), measure=True)
    assert converted.converted_seconds is None and "nacre.convert" not in converted.table()
    with pytest.raises(ValueError, match="measures models and inputs that have values"):
        cost(model, torch.zeros(10, 6, device="meta"), measure=True)
    assert "of limit" in run(capsys, "their_models:small", "--input", "10x6", "--measure")[1]
