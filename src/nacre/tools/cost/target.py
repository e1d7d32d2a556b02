"""What ``nacre cost`` is asked to bill: a model by its name, and inputs by their shapes."""

import difflib
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nacre.applications import APPLICATIONS
from nacre.applications.data import TextData
from nacre.core import check

LARGEST_CONFIG = 2**20
"""Bytes; a configuration is a few kilobytes."""

CHARACTERS = 96
"""The vocabulary of an application that reads characters, where no text is loaded: the printable ones of ASCII."""

IMAGE = (8, 8)
"""The images of an application: scikit-learn's digits."""


@dataclass(frozen=True)
class Shape:
    """One input as the command line describes it: shape, and whether it holds tokens."""

    lengths: tuple[int, ...]
    tokens: bool = False

    def make(self, dtype: torch.dtype, device: str) -> torch.Tensor:
        """Zeros for tokens, which every vocabulary has; normal values otherwise."""
        if self.tokens:
            return torch.zeros(self.lengths, dtype=torch.int64, device=device)
        return torch.randn(self.lengths, device=device).to(dtype)


def shape(text: str, tokens: bool = False) -> Shape:
    """A shape from text such as ``8x3x32x32``.

    Raises:
        ValueError: it is none.

    Example:
        >>> shape("8x3x32x32").lengths
        (8, 3, 32, 32)
    """
    parts = text.lower().split("x")
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise check.error(
            ValueError, "a shape is whole numbers from 1 on with x between them, as 8x3x32x32", repr(text)
        )
    return Shape(tuple(int(part) for part in parts), tokens)


@dataclass(frozen=True)
class Target:
    """A model to bill.

    Args:
        name: as it was asked for.
        build: makes the model; on the device ``meta`` where that is the default device.
        inputs: shapes of the inputs, where the target itself says them.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: tuple[Shape, ...] = ()

    def model(self, device: str) -> nn.Module:
        """The model on a device.

        Raises:
            ValueError: what builds it failed, or made something else.
        """
        try:
            with torch.device(device):
                made = self.build()
        except (Exception, SystemExit) as error:
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"{self.name} could not be built: {type(error).__name__}: {said}") from error
        return _module(self.name, made)


def _module(name: str, made: Any) -> nn.Module:
    if not isinstance(made, nn.Module):
        raise check.error(ValueError, f"{name} must return a torch.nn.Module", f"a {type(made).__name__}")
    return made


def find_target(name: str) -> Target:
    """The model that a name stands for.

    Args:
        name: an application, a Hugging Face ``config.json``, or ``package.module:factory``.

    Raises:
        ValueError: there is no such thing, or the package transformers is not installed.
        OSError: the file is there and cannot be read.

    Example:
        >>> find_target("gpt").inputs
        (Shape(lengths=(12, 64), tokens=True),)
    """
    if name in APPLICATIONS:
        return _application(name)
    if name.endswith(".json"):
        return _configuration(Path(name))
    if ":" in name:
        return _factory(name)
    close = difflib.get_close_matches(name, list(APPLICATIONS), n=1, cutoff=0.6)
    fix = f"Did you mean {close[0]}?" if close else f"The applications are {', '.join(APPLICATIONS)}."
    rule = "nacre cost takes an application, a config.json or package.module:factory"
    raise check.error(ValueError, rule, repr(name), fix)


def _application(name: str) -> Target:
    spec = APPLICATIONS[name]
    batch = spec.recipe.batch_size
    if spec.reads is TextData:
        block = int(spec.sizes()["block"])
        return Target(name, lambda: spec.model(CHARACTERS), (Shape((batch, block), tokens=True),))
    return Target(name, lambda: spec.model(IMAGE, 10), (Shape((batch, 1, *IMAGE)),))


def _factory(name: str) -> Target:
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as ``python -m`` does
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{module_name} cannot be imported: {type(error).__name__}: {said}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            close = difflib.get_close_matches(part, dir(found), n=1, cutoff=0.6)
            rule = f"{module_name} must have what is named after the colon"
            raise check.error(ValueError, rule, repr(attribute), f"Did you mean {close[0]!r}?" if close else "")
        found = getattr(found, part)
    if isinstance(found, nn.Module):
        return Target(name, lambda: found)
    if not callable(found):
        raise check.error(ValueError, f"{name} must be a model or make one", f"a {type(found).__name__}")
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        fix = "Write a function without arguments that calls it."
        raise check.error(ValueError, f"{name} is called without arguments", f"one that says: {error}", fix) from error
    return Target(name, found)


def _configuration(path: Path) -> Target:
    if not path.is_file():
        fix = "Give the config.json of a Hugging Face model."
        raise check.error(ValueError, "a configuration is a file that is there", str(path), fix)
    if path.stat().st_size > LARGEST_CONFIG:
        raise check.error(ValueError, f"a configuration has at most {LARGEST_CONFIG:,} bytes", f"{path}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        rule = "a configuration says what it is of by model_type"
        raise check.error(ValueError, rule, f"{path} without it", "Give the config.json of a Hugging Face model.")
    try:
        import transformers
    except ModuleNotFoundError as error:
        rule = "a model is built from a config.json by the package transformers"
        raise check.error(ValueError, rule, f"none: {error}", "pip install 'nacre[transformers]'") from error

    kind = values.pop("model_type")
    if kind not in transformers.CONFIG_MAPPING:
        close = difflib.get_close_matches(kind, list(transformers.CONFIG_MAPPING.keys()), n=1, cutoff=0.6)
        rule = "the model_type of a configuration must be one that transformers knows"
        raise check.error(ValueError, rule, repr(kind), f"Did you mean {close[0]!r}?" if close else "")
    values.pop("auto_map", None)  # code from elsewhere is not run
    try:
        configuration = transformers.CONFIG_MAPPING[kind](**values)
    except Exception as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is no configuration of {kind}: {said}") from error
    configuration.use_cache = False  # a cache of keys and values is no part of a training step
    names = values.get("architectures") or []
    classes = [getattr(transformers, name, None) for name in names if isinstance(name, str)]
    known = [one for one in classes if inspect.isclass(one) and issubclass(one, nn.Module)]

    def build() -> nn.Module:
        if known:
            model = known[0](configuration)
        else:
            model = transformers.AutoModel.from_config(configuration, trust_remote_code=False)
        dtype = getattr(configuration, "dtype", None)
        return model.to(dtype) if isinstance(dtype, torch.dtype) else model

    size = getattr(configuration, "image_size", None)
    if isinstance(size, int):
        return Target(str(path), build, (Shape((1, getattr(configuration, "num_channels", 3), size, size)),))
    return Target(str(path), build, (Shape((1, 128), tokens=True),))
