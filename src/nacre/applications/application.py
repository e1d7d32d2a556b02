"""The applications: which model learns from which data by which recipe, and how one is put together."""

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nacre.applications import cnn, gpt, mlp, recurrent, vit
from nacre.applications.data import ImageData, TextData
from nacre.applications.recipe import Recipe
from nacre.applications.sources import load_digits, load_idx_folder, load_standard_library, load_text


@dataclass(frozen=True)
class ApplicationSpec:
    """One line of ``APPLICATIONS``.

    Args:
        purpose: what it is, in a few words.
        model: the model's class; its keyword arguments are the sizes a user may choose.
        reads: the kind of data.
        recipe: how it is trained unless told otherwise.
    """

    purpose: str
    model: Callable[..., nn.Module]
    reads: type[ImageData] | type[TextData]
    recipe: Recipe

    def sizes(self) -> dict[str, Any]:
        """The names and defaults of the sizes a user may choose.

        Example:
            >>> APPLICATIONS["gpt"].sizes()
            {'width': 128, 'depth': 4, 'heads': 4, 'block': 64, 'dropout': 0.0}
        """
        parameters = inspect.signature(self.model).parameters.values()
        return {one.name: one.default for one in parameters if one.kind is inspect.Parameter.KEYWORD_ONLY}


APPLICATIONS: dict[str, ApplicationSpec] = {
    "mlp": ApplicationSpec("multi-layer perceptron on digits", mlp.MLP, ImageData, mlp.RECIPE),
    "cnn": ApplicationSpec("convolutional network on digits", cnn.CNN, ImageData, cnn.RECIPE),
    "vit": ApplicationSpec("vision transformer on digits", vit.ViT, ImageData, vit.RECIPE),
    "lstm": ApplicationSpec("LSTM on characters", recurrent.LSTMLanguageModel, TextData, recurrent.RECIPE),
    "gru": ApplicationSpec("GRU on characters", recurrent.GRULanguageModel, TextData, recurrent.RECIPE),
    "gpt": ApplicationSpec("GPT on characters", gpt.GPT, TextData, gpt.RECIPE),
}


@dataclass
class Application:
    """A model, its data and its recipe, ready to be trained.

    Args:
        name: its name in ``APPLICATIONS``.
        model: the network, with its loss as ``criterion``.
        data: what it learns from.
        recipe: how.
        seed: of the first weights, the order of the data and the dropout masks.
        sizes: the model's sizes.
        source: the file or folder of the data; None for the default.
        layers: whose layers the model is made of, ``nacre`` or ``torch``; a note for the record.
    """

    name: str
    model: nn.Module
    data: ImageData | TextData
    recipe: Recipe
    seed: int
    sizes: dict[str, Any]
    source: str | None = None
    layers: str = "nacre"

    @property
    def steps(self) -> int:
        """The length of the run in steps."""
        if self.recipe.steps is not None:
            return self.recipe.steps
        return (self.recipe.epochs or 0) * self.data.steps_per_epoch(self.recipe.batch_size)

    @property
    def validate_every(self) -> int:
        """The steps between two validations."""
        return self.recipe.validate_every or self.data.steps_per_epoch(self.recipe.batch_size)

    def settings(self) -> dict[str, Any]:
        """All that a run is determined by, as plain values: the record in its checkpoints."""
        recipe = asdict(self.recipe)
        recipe["betas"] = list(self.recipe.betas)
        return {
            "application": self.name,
            "layers": self.layers,
            "seed": self.seed,
            "source": self.source,
            "data": self.data.fingerprint(),
            "sizes": dict(self.sizes),
            "recipe": recipe,
        }


def build(
    name: str,
    *,
    data: ImageData | TextData | str | Path | None = None,
    recipe: Recipe | None = None,
    seed: int = 0,
    **sizes: Any,
) -> Application:
    """Put an application together: load its data and build its model from the seed, with nacre's layers.

    torch's global generator is left as it was.

    Args:
        name: one of ``APPLICATIONS``.
        data: a file (text) or a folder (images), or data already loaded. Default None: scikit-learn's digits, or the
            source of Python's standard library.
        recipe: how to train. Default None: the application's own.
        seed: of the first weights, the order of the data and the dropout masks. Default 0.
        sizes: the model's keyword arguments; None stands for the default.

    Raises:
        ValueError: an unknown name or a size the model cannot have, damaged or too little data.
        TypeError: a size that the model does not know.
        OSError: the data cannot be read.

    Example:
        >>> application = build("gpt", data=TextData("to be or not to be. " * 50), width=32, depth=1)
        >>> application.steps, application.sizes["heads"]
        (2000, 4)
    """
    if name not in APPLICATIONS:
        raise ValueError(f"there is no application {name!r}; there are {', '.join(APPLICATIONS)}.")
    spec = APPLICATIONS[name]
    defaults = spec.sizes()
    if unknown := set(sizes) - set(defaults):
        raise TypeError(f"{name} has no {', '.join(sorted(unknown))}; it has {', '.join(defaults)}.")
    chosen = defaults | {key: value for key, value in sizes.items() if value is not None}
    _check_sizes(chosen)
    source = str(Path(data).resolve()) if isinstance(data, (str, Path)) else None
    loaded = data if isinstance(data, (ImageData, TextData)) else _load(spec, source, chosen)
    if not isinstance(loaded, spec.reads):
        raise TypeError(f"{name} learns from {spec.reads.__name__}; got {type(loaded).__name__}.")
    inputs = (len(loaded.vocabulary),) if isinstance(loaded, TextData) else (loaded.image_size, loaded.classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = spec.model(*inputs, **chosen)
    return Application(name, model, loaded, recipe or spec.recipe, seed, chosen, source)


def _check_sizes(sizes: dict[str, Any]) -> None:
    for name, value in sizes.items():
        if name != "dropout" and value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}.")


def _load(spec: ApplicationSpec, source: str | None, sizes: dict[str, Any]) -> ImageData | TextData:
    if spec.reads is TextData:
        return load_text(source, sizes["block"]) if source else load_standard_library(sizes["block"])
    return load_idx_folder(source) if source else load_digits()
