"""Training: it learns, it goes on bit for bit after an interruption, and it refuses what is damaged."""

import csv
import io
import json
import logging
import random
import signal
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_model

import nacre
from nacre.applications import APPLICATIONS, Application, Recipe
from nacre.applications.callbacks import Interruption
from nacre.applications.checkpoint import read_checkpoint
from nacre.applications.files import replacing
from nacre.applications.training import RUN_FILES, train
from tests.applications.support import interrupting_at, tiny_application, tiny_images

RECIPE = Recipe(batch_size=16, learning_rate=1e-2, steps=10, validate_every=4)


def weights(application: Application) -> list[torch.Tensor]:
    return list(application.model.parameters())


def same_weights(one: Application, two: Application) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(two), strict=True))


def read_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", APPLICATIONS)
def test_a_short_training_reduces_the_loss(name: str) -> None:
    application = tiny_application(name, Recipe(batch_size=16, learning_rate=1e-2, steps=40), dropout=0.0)
    result = train(application)
    losses = list(result.training_loss.values())
    assert list(result.training_loss) == list(range(1, 41))
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert result.finished
    assert result.final["validation_loss"] < losses[0]
    assert not application.model.training


@pytest.mark.parametrize("name", APPLICATIONS)
def test_torch_layers_and_nacre_layers_give_the_same_losses(name: str) -> None:
    recipe = Recipe(batch_size=16, learning_rate=1e-2, steps=8)
    ours, theirs = (tiny_application(name, recipe, dropout=0.0) for _ in range(2))
    nacre.convert(theirs.model, to="torch")
    assert type(theirs.model.head if name != "cnn" else theirs.model.head[-1]) is torch.nn.Linear
    one, two = train(ours), train(theirs)
    # float32 rounding, 1e-7 of a loss near 1, which each of the 8 steps may multiply by a few
    assert list(one.training_loss.values()) == pytest.approx(list(two.training_loss.values()), rel=1e-4)
    assert one.final == pytest.approx(two.final, rel=1e-4)


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not() -> None:
    runs = []
    for seed, disturbance in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(disturbance)
        application = tiny_application("gpt", RECIPE, seed=seed)
        train(application)
        runs.append(application)
    assert same_weights(runs[0], runs[1])
    assert not same_weights(runs[0], runs[2])


def test_the_callers_random_numbers_and_settings_are_left_alone() -> None:
    torch.manual_seed(3)
    random_state, handlers = torch.get_rng_state(), [signal.getsignal(one) for one in Interruption.SIGNALS]
    level = logging.getLogger("lightning.pytorch").level
    train(tiny_application("mlp", RECIPE))
    assert torch.equal(random_state, torch.get_rng_state())
    assert [signal.getsignal(one) for one in Interruption.SIGNALS] == handlers
    assert logging.getLogger("lightning.pytorch").level == level


# steps before, at and after a validation, and the last but one
@pytest.mark.parametrize("step", [1, 3, 4, 5, 9])
@pytest.mark.parametrize("name", ["mlp", "gpt"])
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path: Path, name: str, step: int) -> None:
    whole = tiny_application(name, RECIPE)
    expected = train(whole, folder=tmp_path / "whole")

    begun = tiny_application(name, RECIPE)
    partial = train(begun, folder=tmp_path / "parts", on_step=interrupting_at(step))
    assert (partial.step, partial.finished) == (step, False)
    assert not (tmp_path / "parts" / "weights.safetensors").exists()

    torch.manual_seed(1000 + step)
    resumed = tiny_application(name, RECIPE)
    result = train(resumed, folder=tmp_path / "parts", resume=tmp_path / "parts" / "last.ckpt")
    assert result.finished
    assert same_weights(whole, resumed)
    assert result.training_loss == expected.training_loss
    assert result.validation == expected.validation
    assert read_rows(tmp_path / "parts") == read_rows(tmp_path / "whole")


@pytest.mark.parametrize("name", ["cnn", "vit", "lstm", "gru"])
def test_every_application_resumes_bit_for_bit(tmp_path: Path, name: str) -> None:
    whole = tiny_application(name, RECIPE)
    train(whole)
    train(tiny_application(name, RECIPE), folder=tmp_path, on_step=interrupting_at(6))
    resumed = tiny_application(name, RECIPE)
    train(resumed, resume=tmp_path / "last.ckpt")
    assert same_weights(whole, resumed)


def test_a_run_that_died_goes_on_from_its_last_validation(tmp_path: Path) -> None:
    def die(step: int, steps: int, loss: float) -> None:
        if step == 7:
            raise OSError("the machine went away")

    whole = tiny_application("mlp", RECIPE)
    train(whole)
    with pytest.raises(OSError, match="went away"):
        train(tiny_application("mlp", RECIPE), folder=tmp_path, on_step=die)
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 4
    resumed = tiny_application("mlp", RECIPE)
    result = train(resumed, resume=tmp_path / "last.ckpt")
    assert list(result.training_loss) == list(range(1, 11))
    assert same_weights(whole, resumed)


def test_a_finished_run_can_be_made_longer(tmp_path: Path) -> None:
    train(tiny_application("mlp", RECIPE), folder=tmp_path)
    longer = tiny_application("mlp", RECIPE.lasting(steps=15))
    result = train(longer, folder=tmp_path, resume=tmp_path / "last.ckpt")
    assert list(result.training_loss) == list(range(1, 16))
    assert list(result.validation) == [4, 8, 10, 12, 15]
    again = tiny_application("mlp", RECIPE.lasting(steps=15))
    assert train(again, resume=tmp_path / "last.ckpt").training_loss == result.training_loss
    assert same_weights(longer, again)


@pytest.mark.parametrize("step", [4, 6])
def test_a_run_that_is_told_to_end_saves_and_ends(tmp_path: Path, step: int) -> None:
    application = tiny_application("mlp", RECIPE)
    result = train(application, folder=tmp_path, on_step=interrupting_at(step, signal.SIGTERM))
    assert (result.step, result.finished) == (step, False)
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == step


def test_ctrl_c_without_a_folder_is_a_keyboard_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tiny_application("mlp", RECIPE), on_step=interrupting_at(3))


def test_the_learning_rate_follows_the_recipe(tmp_path: Path) -> None:
    recipe = Recipe(batch_size=16, learning_rate=1e-2, steps=30, warm_up_steps=2, validate_every=30)
    train(tiny_application("mlp", recipe), folder=tmp_path)
    rates = [float(row["learning_rate"]) for row in read_rows(tmp_path)]
    assert rates == pytest.approx([recipe.learning_rate_at(step, 30) for step in range(30)])
    assert rates[0] == pytest.approx(0.005)
    assert rates[2] == pytest.approx(0.01)
    assert rates[29] < 0.0012


def test_the_gradient_is_clipped(tmp_path: Path) -> None:
    lengths = []
    application = tiny_application("mlp", Recipe(batch_size=16, learning_rate=1e-2, steps=1, gradient_clip=1e-3))
    parameters = weights(application)
    original = torch.optim.AdamW.step

    def step(optimizer: torch.optim.AdamW, *arguments: object, **options: object) -> object:
        result = original(optimizer, *arguments, **options)  # type: ignore[arg-type]
        lengths.append(torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm().item())
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        train(application)
    assert lengths == pytest.approx([1e-3], rel=1e-2)  # torch adds 1e-6 to the length it divides by


def test_a_run_writes_its_files_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = train(tiny_application("gpt", RECIPE), folder="run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    assert sorted(contents(tmp_path / "run")) == sorted(RUN_FILES)
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((tmp_path / "run" / "run.json").read_text())
    assert summary["application"] == "gpt"
    assert summary["validation_loss"] == result.final["validation_loss"]


def test_the_csv_has_a_row_for_every_step(tmp_path: Path) -> None:
    result = train(tiny_application("mlp", RECIPE), folder=tmp_path)
    rows = read_rows(tmp_path)
    assert [int(row["step"]) for row in rows] == list(range(1, 11))
    assert [float(row["training_loss"]) for row in rows] == list(result.training_loss.values())
    validated = [int(row["step"]) for row in rows if row["validation_loss"]]
    assert validated == [4, 8, 10]
    assert [float(row["accuracy"]) for row in rows if row["accuracy"]] == [
        found["accuracy"] for found in result.validation.values()
    ]


@pytest.mark.parametrize("name", ["cnn", "gpt"])
def test_the_weights_file_gives_the_same_outputs(tmp_path: Path, name: str) -> None:
    trained = tiny_application(name, RECIPE)
    train(trained, folder=tmp_path)
    fresh = tiny_application(name, RECIPE, seed=9)
    missing, unexpected = load_model(fresh.model, tmp_path / "weights.safetensors")
    assert not missing
    assert not unexpected
    inputs = trained.data.training_batch(0, 4, seed=0)[0]
    assert torch.equal(trained.model.eval()(inputs), fresh.model.eval()(inputs))
    if name == "gpt":
        with safe_open(tmp_path / "weights.safetensors", framework="pt") as file:
            assert file.metadata()["vocabulary"] == trained.data.vocabulary.characters


def test_the_validation_measures_are_those_of_the_whole_held_out_part() -> None:
    application = tiny_application("mlp", RECIPE)
    result = train(application)
    images, labels = next(application.data.validation_batches())
    logits = application.model(images)
    assert result.final["validation_loss"] == pytest.approx(application.model.criterion(logits, labels).item())
    assert result.final["accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    application = tiny_application("mlp", RECIPE)
    with torch.no_grad():
        weights(application)[0].fill_(torch.inf)
    with pytest.raises(FloatingPointError, match="it was nan at step 1"):
        train(application, folder=tmp_path)
    assert not contents(tmp_path)


def damaged_checkpoints(whole: bytes) -> dict[str, bytes]:
    """The checkpoint of a run, spoiled in different ways."""
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        part = max(archive.infolist(), key=lambda info: info.file_size)
        content = archive.read(part)
    place = whole.find(content) + len(content) // 2
    flipped = bytearray(whole)
    flipped[place] ^= 1
    other = io.BytesIO()
    torch.save({"weights": torch.zeros(3)}, other)
    checkpoint = torch.load(io.BytesIO(whole), weights_only=True)
    checkpoint["nacre"]["recipe"]["momentum"] = 0.9
    version = io.BytesIO()
    torch.save(checkpoint, version)
    harmful = io.BytesIO()
    torch.save({"nacre": random.Random(0)}, harmful)
    return {
        "empty": b"",
        "text": b"not a checkpoint",
        "truncated": whole[: len(whole) // 2],
        "one bit": bytes(flipped),
        "another file": other.getvalue(),
        "another version": version.getvalue(),
        "code": harmful.getvalue(),
    }


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "one bit", "another file", "another version", "code"])
def test_a_damaged_checkpoint_is_refused_and_changes_nothing(tmp_path: Path, damage: str) -> None:
    train(tiny_application("mlp", RECIPE), folder=tmp_path, on_step=interrupting_at(5))
    path = tmp_path / "last.ckpt"
    path.write_bytes(damaged_checkpoints(path.read_bytes())[damage])
    before = contents(tmp_path)
    application = tiny_application("mlp", RECIPE)
    state = [parameter.clone() for parameter in weights(application)]
    with pytest.raises(ValueError, match=r"must be a (whole )?checkpoint of nacre train") as error:
        train(application, folder=tmp_path, resume=path)
    assert str(path) in str(error.value)
    assert contents(tmp_path) == before
    assert all(torch.equal(a, b) for a, b in zip(state, weights(application), strict=True))


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    train(tiny_application("mlp", RECIPE), folder=tmp_path, on_step=interrupting_at(5))
    path = tmp_path / "last.ckpt"
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        train(tiny_application("mlp", RECIPE), resume=tmp_path / "nowhere.ckpt")
    with pytest.raises(ValueError, match=r"differs in seed \(0 then, 1 now\)"):
        train(tiny_application("mlp", RECIPE, seed=1), resume=path)
    with pytest.raises(ValueError, match=r"differs in dropout \(0\.3 then, 0\.1 now\)"):
        train(tiny_application("mlp", RECIPE, dropout=0.1), resume=path)
    with pytest.raises(ValueError, match=r"application \(mlp then, cnn now\)"):
        train(tiny_application("cnn", RECIPE), resume=path)
    with pytest.raises(ValueError, match="is at step 5 and the run is to end at 4"):
        train(tiny_application("mlp", RECIPE.lasting(steps=4)), resume=path)
    other_data = tiny_application("mlp", RECIPE)
    other_data.data = tiny_images(count=30)
    with pytest.raises(ValueError, match=r"differs in data \("):
        train(other_data, resume=path)
    other_model = tiny_application("mlp", RECIPE)
    other_model.model.head = torch.nn.Linear(8, 3)
    with pytest.raises(ValueError, match=r"differs in model\.head\.bias, model\.head\.weight"):
        train(other_model, resume=path)


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="got 'tpu'"):
        train(tiny_application("mlp", RECIPE), device="tpu")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "kept.txt"
    path.write_text("old")
    with pytest.raises(OSError, match="disk full"), replacing(path) as partial:
        partial.write_text("half")
        raise OSError("disk full")
    assert contents(tmp_path) == {"kept.txt": b"old"}


def test_a_file_is_replaced_in_one_move(tmp_path: Path) -> None:
    path = tmp_path / "kept.txt"
    path.write_text("old")
    with path.open() as reader:
        with replacing(path) as partial:
            partial.write_text("new")
            assert path.read_text() == "old"
        assert reader.read() == "old"  # writing into the file itself would show here
    assert contents(tmp_path) == {"kept.txt": b"new"}
