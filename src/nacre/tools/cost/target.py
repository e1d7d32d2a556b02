"""What ``nacre cost`` is asked to bill: a model by its name, and inputs by their shapes."""

import difflib
import importlib
import inspect
import json
import math
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

LARGEST_INPUT = 2**48
"""Numbers; with 8 bytes for each, whatever follows from them can still be counted."""

CHARACTERS = 96
"""The vocabulary of an application that reads characters, where no text is loaded: the printable ones of ASCII."""

IMAGE = (8, 8)
"""The images of an application: scikit-learn's digits."""


@dataclass(frozen=True)
class Shape:
    """One input as the command line describes it: shape, whether it holds tokens, and its name where it has one."""

    lengths: tuple[int, ...]
    tokens: bool = False
    name: str = ""

    def make(self, dtype: torch.dtype, device: str) -> torch.Tensor:
        """Zeros for tokens, which every vocabulary has; normal values otherwise."""
        if self.tokens:
            return torch.zeros(self.lengths, dtype=torch.int64, device=device)
        return torch.randn(self.lengths, device=device).to(dtype)


def shape(text: str, tokens: bool = False) -> Shape:
    """A shape from text such as ``8x3x32x32``, or ``pixel_values=8x3x32x32`` for an input by its name.

    Raises:
        ValueError: it is none.

    Example:
        >>> shape("8x3x32x32").lengths
        (8, 3, 32, 32)
        >>> shape("decoder_input_ids=4x64", tokens=True).name
        'decoder_input_ids'
    """
    name, named, numbers = text.rpartition("=")
    parts = numbers.lower().split("x")
    right = all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts)
    if not right or (named and not name.isidentifier()):
        rule = "a shape is whole numbers from 1 on with x between them, as 8x3x32x32, or one with a name, as ids=4x512"
        raise check.error(ValueError, rule, repr(text))
    lengths = tuple(int(part) for part in parts)
    if math.prod(lengths) > LARGEST_INPUT:
        raise check.error(ValueError, f"an input has at most {LARGEST_INPUT:,} numbers", repr(text))
    return Shape(lengths, tokens, name)


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
            said = first_line(error)
            raise ValueError(f"{self.name} could not be built: {type(error).__name__}: {said}") from error
        return _module(self.name, made)


def first_line(error: BaseException) -> str:
    """What an error says, on one line: the first, and the one below it where that only announces it.

    Example:
        >>> first_line(ValueError("the field 'n_layer':\\n    a number, not text"))
        "the field 'n_layer': a number, not text"
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 1 + lines[0].endswith(":")])


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
        (Shape(lengths=(12, 64), tokens=True, name=''),)
    """
    if name in APPLICATIONS:
        return _application(name)
    if name.endswith(".json"):
        return _configuration(Path(name))
    if ":" in name:
        return _factory(name)
    if Path(name, "config.json").is_file():
        return _configuration(Path(name, "config.json"))
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
    if not module_name or not attribute:
        fix = "As in my_models:small, for the function small in my_models.py."
        raise check.error(ValueError, "a factory is package.module:name", repr(name), fix)
    if module_name.endswith(".py") or os.sep in module_name:
        fix = f"Did you mean {Path(module_name).stem}:{attribute}, from the folder it is in?"
        raise check.error(ValueError, "a factory is named by its module, not by a file", repr(name), fix)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as ``python -m`` does
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        said = first_line(error)
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
        said = first_line(error)
        raise ValueError(f"{path} is no configuration of {kind}: {said}") from error
    configuration.use_cache = False  # a cache of keys and values is no part of a training step
    names = values.get("architectures") or []
    classes = [getattr(transformers, name, None) for name in names if isinstance(name, str)]
    classes.append(transformers.MODEL_MAPPING.get(type(configuration), None))
    known = [one for one in classes if inspect.isclass(one) and issubclass(one, nn.Module)]
    if not known:
        raise check.error(ValueError, f"transformers has a model for each configuration; {kind} has none", str(path))

    def build() -> nn.Module:
        model = known[0](configuration)
        dtype = getattr(configuration, "dtype", None)
        return model.to(dtype) if isinstance(dtype, torch.dtype) else model

    return Target(str(path), build, usual_inputs(configuration, known[0]))


def usual_inputs(configuration: Any, model: Any) -> tuple[Shape, ...]:
    """What a model of transformers is called with: an image, 128 tokens, or both; nothing where that is not known.

    Args:
        configuration: says how large images are.
        model: the class, which says what its first input is.
    """
    main = getattr(model, "main_input_name", "input_ids")
    names = inspect.signature(model.forward).parameters
    vision = getattr(configuration, "vision_config", configuration)
    size = getattr(vision, "image_size", None) or 224
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    image = Shape((1, getattr(vision, "num_channels", 3), height, width), name="pixel_values")
    text = Shape((1, 128), tokens=True, name="input_ids")
    if main == "pixel_values":
        return (image,)
    if main != "input_ids":
        return ()
    if getattr(configuration, "is_encoder_decoder", False) and "decoder_input_ids" in names:
        return (text, Shape((1, 128), tokens=True, name="decoder_input_ids"))
    return (text, image) if "pixel_values" in names and vision is not configuration else (text,)
