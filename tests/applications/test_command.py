"""The command ``nacre train``, from its arguments to its files."""

import argparse
import json
from pathlib import Path

import pytest
import torch

from nacre.applications import APPLICATIONS, command
from tests.applications.support import TEXT, write_idx_folder


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A text file, in an empty folder that is the current one."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def nacre_train(*arguments: object, converted: list[torch.nn.Module] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="nacre train")
    command.add_arguments(parser)
    converted = [] if converted is None else converted
    return command.run(parser.parse_args([str(argument) for argument in arguments]), converted.append)


SMALL = ("--width", 8, "--depth", 1, "--block", 8, "--batch-size", 4)


def test_a_run_ends_in_its_folder_with_a_summary(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert nacre_train("gpt", "--data", text, "--steps", 6, "--validate-every", 3, "--heads", 2, *SMALL) == 0
    printed = capsys.readouterr()
    assert "gpt with nacre layers" in printed.out
    assert "text.txt: 1,680 characters" in printed.out
    assert printed.out.count("validation loss") == 3
    assert "it writes:" in printed.out
    assert not printed.err
    assert json.loads(Path("runs/gpt-nacre/run.json").read_text())["steps"] == 6


def test_layers_torch_converts_the_very_same_model(text: Path) -> None:
    converted: list[torch.nn.Module] = []
    assert nacre_train("gru", "--data", text, "--steps", 1, "--layers", "torch", *SMALL, converted=converted) == 0
    assert [type(model).__name__ for model in converted] == ["GRULanguageModel"]
    assert json.loads(Path("runs/gru-torch/run.json").read_text())["layers"] == "torch"


def test_resume_takes_all_settings_from_the_checkpoint(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = ("lstm", "--data", text, "--seed", 3, "--learning-rate", 0.01, "--dropout", 0.2, *SMALL)
    assert nacre_train(*first, "--steps", 3) == 0
    assert nacre_train("lstm", "--resume", "--steps", 5) == 0
    assert nacre_train(*first, "--steps", 5, "--resume", "runs/lstm-nacre/last.ckpt", "--out", "elsewhere") == 0
    one, two = (json.loads(Path(path, "run.json").read_text()) for path in ("runs/lstm-nacre", "elsewhere"))
    assert one["sizes"] == two["sizes"] == {"width": 8, "depth": 1, "block": 8, "dropout": 0.2}
    assert one["seed"] == 3
    assert one["recipe"]["learning_rate"] == 0.01
    assert one["steps"] == 5
    assert one["validation_loss"] == two["validation_loss"]
    with pytest.raises(ValueError, match=r"differs in seed \(3 then, 4 now\)"):
        nacre_train("lstm", "--resume", "--seed", 4)
    with pytest.raises(ValueError, match="it is of lstm, not gru"):
        nacre_train("gru", "--resume", "runs/lstm-nacre/last.ckpt")
    capsys.readouterr()


def test_ctrl_c_ends_with_the_way_to_go_on(
    text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nacre.applications import training
    from tests.applications.support import interrupting_at

    original = training.train
    monkeypatch.setattr(
        training, "train", lambda *arguments, **options: original(*arguments, on_step=interrupting_at(2), **options)
    )
    assert nacre_train("gru", "--data", text, "--steps", 9, *SMALL) == command.INTERRUPTED
    assert "stopped at step 2 of 9; go on with: nacre train gru --resume runs/gru-nacre/last.ckpt" in (
        capsys.readouterr().out
    )


def test_a_run_is_not_replaced_unasked(text: Path) -> None:
    arguments = ("gru", "--data", text, "--steps", 1, *SMALL)
    nacre_train(*arguments)
    before = Path("runs/gru-nacre/weights.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match=r"already holds last\.ckpt"):
        nacre_train(*arguments, "--seed", 1)
    assert Path("runs/gru-nacre/weights.safetensors").read_bytes() == before
    assert nacre_train(*arguments, "--seed", 1, "--overwrite") == 0
    assert Path("runs/gru-nacre/weights.safetensors").read_bytes() != before


def test_images_come_from_a_folder_in_epochs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_idx_folder(tmp_path / "images")
    arguments = ("--data", folder, "--epochs", 2, "--batch-size", 4, "--width", 8, "--out", tmp_path / "run")
    assert nacre_train("mlp", *arguments) == 0
    assert "6 training and 4 test images of 5x7 pixels, 3 classes" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "run.json").read_text())["steps"] == 4


def test_a_damaged_data_file_leaves_no_folder(tmp_path: Path) -> None:
    folder = write_idx_folder(tmp_path / "images")
    (folder / "t10k-labels-idx1-ubyte").write_bytes(b"\x00")
    with pytest.raises(ValueError, match="t10k-labels-idx1-ubyte must begin with"):
        nacre_train("cnn", "--data", folder, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["rnn"],
        ["gpt", "--steps", "0"],
        ["gpt", "--steps", "5", "--epochs", "5"],
        ["gpt", "--learning-rate", "-1"],
        ["gpt", "--learning-rate", "nan"],
        ["gpt", "--dropout", "1.5"],
        ["gpt", "--layers", "keras"],
        ["mlp", "--heads", "2"],
        ["gpt", "--width", "wide"],
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        nacre_train(*arguments)
    assert error.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize("name", APPLICATIONS)
def test_the_help_names_every_size_and_its_default(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        nacre_train(name, "--help")
    printed = " ".join(capsys.readouterr().out.split())
    for size, default in APPLICATIONS[name].sizes().items():
        assert f"--{size} " in printed
        assert default is None or f"(default: {default})" in printed
