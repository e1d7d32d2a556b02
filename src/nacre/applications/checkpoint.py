"""Checkpoints, read with suspicion: nothing of a run changes before the whole file was found good."""

import zipfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nacre.applications.application import APPLICATIONS, Application
from nacre.applications.recipe import Recipe

RECORD = "nacre"
"""The key of a checkpoint under which the run's settings stand."""

_KEYS = {RECORD, "generators", "state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks", "global_step"}
_RECORD_KEYS = {"application", "layers", "seed", "source", "data", "sizes", "recipe"}
_LENGTH = {"steps", "epochs"}


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of ``train`` without running any code that it may hold, and check every byte of it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or is not a checkpoint of ``train``.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path} to go on from. Start the run without --resume.")
    try:
        # torch.load skips the archive's checksums, so flipped bits in a weight would pass unseen
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"the checksum of its part {damaged} is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged archive fails in any way that zipfile, torch or pickle can fail
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} must be a whole checkpoint of nacre train; {reason}. Use another one.") from error
    if not isinstance(checkpoint, dict) or not checkpoint.keys() >= _KEYS or not _is_record(checkpoint[RECORD]):
        raise ValueError(f"{path} must be a checkpoint of nacre train; it is of another kind or version.")
    return checkpoint


def _is_record(record: Any) -> bool:
    if not isinstance(record, dict) or record.keys() != _RECORD_KEYS or record["application"] not in APPLICATIONS:
        return False
    sizes, recipe = record["sizes"], record["recipe"]
    if not isinstance(sizes, dict) or not isinstance(recipe, dict):
        return False
    known = {field.name for field in fields(Recipe)}
    return sizes.keys() == APPLICATIONS[record["application"]].sizes().keys() and recipe.keys() == known


def check_continues(path: str | Path, checkpoint: dict[str, Any], application: Application) -> None:
    """Check that ``application`` is the run that wrote the checkpoint; only its length may differ.

    Raises:
        ValueError: another setting, other data, another model, or fewer steps than were already made.
    """
    differences = _differences(checkpoint[RECORD], application.settings())
    if differences:
        raise ValueError(
            f"a run goes on with the settings it was started with; {path} differs in {'; '.join(differences)}."
            " Leave these settings out, or start a run of its own."
        )
    _check_weights(path, checkpoint["state_dict"], application.model)
    if checkpoint["global_step"] > application.steps:
        raise ValueError(
            f"a run cannot end before it stands; {path} is at step {checkpoint['global_step']:,} and the run is to end"
            f" at {application.steps:,}. Give more steps."
        )


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    def flat(settings: dict[str, Any]) -> dict[str, Any]:
        sizes, recipe = settings["sizes"], settings["recipe"]
        plain = {key: value for key, value in settings.items() if key not in {"sizes", "recipe", "source"}}
        return plain | sizes | {key: value for key, value in recipe.items() if key not in _LENGTH}

    old, new = flat(before), flat(now)
    return [
        f"{name} ({old.get(name)} then, {new.get(name)} now)"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def _check_weights(path: str | Path, weights: dict[str, Any], model: nn.Module) -> None:
    expected = {f"model.{name}": tensor.shape for name, tensor in model.state_dict().items()}
    found = {name: getattr(tensor, "shape", None) for name, tensor in weights.items()}
    if expected != found:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise ValueError(f"{path} must hold the weights of this model; it differs in {', '.join(wrong[:5])}.")
