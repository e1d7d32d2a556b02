"""The command ``nacre train``: its arguments, and what it does with them.

``convert`` belongs to the tools, which stand above the applications; the command line hands it in.
"""

import argparse
import math
import shlex
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nacre.applications.application import APPLICATIONS, Application, ApplicationSpec, build
from nacre.applications.checkpoint import RECORD, read_checkpoint
from nacre.applications.data import TextData
from nacre.applications.generation import generate
from nacre.applications.recipe import Recipe

if TYPE_CHECKING:
    from nacre.applications.training import Result

INTERRUPTED = 130
"""The exit status of a command that was stopped by Ctrl-C."""

SAMPLE_LENGTH = 200
"""The characters of the text that a language model writes when it was trained."""

_SIZE_HELP = {
    "width": "features of a hidden layer or token, channels of the first stage of a CNN",
    "depth": "hidden layers or blocks",
    "heads": "attention heads of a block",
    "block": "characters of a window",
    "patch": "height and width of a patch in pixels",
    "dropout": "share of features dropped in training, from 0 to 1",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the arguments of ``nacre train``: one subcommand for each application.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_arguments(parser)
        >>> parser.parse_args(["gpt", "--steps", "10", "--width", "32"]).width
        32
    """
    applications = parser.add_subparsers(dest="application", required=True, metavar="{" + ",".join(APPLICATIONS) + "}")
    for name, spec in APPLICATIONS.items():
        _add_application(applications.add_parser(name, help=spec.purpose, description=spec.purpose), name, spec)


def _add_application(parser: argparse.ArgumentParser, name: str, spec: ApplicationSpec) -> None:
    recipe = spec.recipe
    reads_text = spec.reads is TextData
    parser.add_argument("--layers", choices=["nacre", "torch"], help="whose layers (default: nacre)")
    parser.add_argument("--data", metavar="FILE" if reads_text else "DIR", help=_data_help(reads_text))
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=_positive_integer, metavar="N", help=_default("epochs", recipe.epochs))
    length.add_argument("--steps", type=_positive_integer, metavar="N", help=_default("steps", recipe.steps))
    parser.add_argument("--seed", type=int, metavar="N", help="of weights, data order and dropout (default: 0)")
    parser.add_argument(
        "--batch-size",
        type=_positive_integer,
        metavar="N",
        help=_default("windows or images a step", recipe.batch_size),
    )
    parser.add_argument(
        "--learning-rate", type=_positive_number, metavar="X", help=_default("its largest value", recipe.learning_rate)
    )
    parser.add_argument(
        "--validate-every",
        type=_positive_integer,
        metavar="N",
        help=_default("steps between validations and checkpoints", recipe.validate_every or "an epoch"),
    )
    for size, default in spec.sizes().items():
        kind, letter = (_share, "X") if size == "dropout" else (_positive_integer, "N")
        parser.add_argument(f"--{size}", type=kind, metavar=letter, help=_default(_SIZE_HELP[size], default))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to train (default: cpu)")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"the run's folder (default: runs/{name}-LAYERS)")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="CHECKPOINT",
        help="go on from a checkpoint, with its settings (default: last.ckpt of the run's folder)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a run that the folder already holds")


def run(arguments: argparse.Namespace, convert: Callable[[nn.Module], object]) -> int:
    """Train as the arguments say, print how it goes, and return the exit status.

    Args:
        arguments: parsed by a parser that ``add_arguments`` prepared.
        convert: turns a model's nacre layers into torch.nn's, in place; called for ``--layers torch``.

    Raises:
        ValueError: a setting, data file or checkpoint that cannot be used.
        FileExistsError: the folder holds another run.
        OSError: data or checkpoint cannot be read, results cannot be written.
        FloatingPointError: the loss became infinite or not a number.
        ModuleNotFoundError: a package of the ``apps`` extra is missing.
    """
    from nacre.applications.training import RUN_FILES, train

    checkpoint = _checkpoint_path(arguments)
    application = _application(arguments, _record(arguments.application, checkpoint))
    if application.layers == "torch":
        convert(application.model)
    folder = _folder(arguments, application, checkpoint)
    if checkpoint is None or folder.resolve() != checkpoint.resolve().parent:
        _make_room(folder, RUN_FILES, arguments.overwrite)
    parameters = sum(parameter.numel() for parameter in application.model.parameters())
    print(f"{application.name} with {application.layers} layers: {parameters:,} parameters")
    print(f"data: {application.data.description}")
    print(f"{application.steps:,} steps of {application.recipe.batch_size}, into {folder}", flush=True)
    result = train(application, folder=folder, resume=checkpoint, device=arguments.device, progress=True)
    _print_result(application, result, folder)
    return 0 if result.finished else INTERRUPTED


def _checkpoint_path(arguments: argparse.Namespace) -> Path | None:
    if arguments.resume is None:
        return None
    folder = arguments.out or _default_folder(arguments.application, arguments.layers or "nacre")
    return Path(arguments.resume) if arguments.resume else folder / "last.ckpt"


def _record(name: str, checkpoint: Path | None) -> dict[str, Any]:
    if checkpoint is None:
        return {}
    record: dict[str, Any] = read_checkpoint(checkpoint)[RECORD]
    if record["application"] != name:
        raise ValueError(f"{checkpoint} belongs to another application; it is of {record['application']}, not {name}.")
    return record


def _application(arguments: argparse.Namespace, record: dict[str, Any]) -> Application:
    """The application of the arguments; what they leave open is as in the record, or the default."""
    given = {key: value for key, value in vars(arguments).items() if value is not None}
    spec = APPLICATIONS[arguments.application]
    recipe = spec.recipe
    if record:
        recipe = Recipe(**record["recipe"] | {"betas": tuple(record["recipe"]["betas"])})
    recipe = recipe.lasting(arguments.steps, arguments.epochs)
    length = {"steps", "epochs"}
    recipe = replace(
        recipe, **{one.name: given[one.name] for one in fields(Recipe) if one.name in given and one.name not in length}
    )
    sizes = record.get("sizes", {}) | {name: given[name] for name in spec.sizes() if name in given}
    application = build(
        arguments.application,
        data=given.get("data", record.get("source")),
        recipe=recipe,
        seed=given.get("seed", record.get("seed", 0)),
        **sizes,
    )
    application.layers = given.get("layers", record.get("layers", "nacre"))
    return application


def _default_folder(name: str, layers: str) -> Path:
    return Path("runs") / f"{name}-{layers}"


def _folder(arguments: argparse.Namespace, application: Application, checkpoint: Path | None) -> Path:
    if arguments.out is not None:
        return arguments.out
    return checkpoint.parent if checkpoint is not None else _default_folder(application.name, application.layers)


def _make_room(folder: Path, names: tuple[str, ...], overwrite: bool) -> None:
    found = [folder / name for name in names if (folder / name).exists()]
    if found and not overwrite:
        raise FileExistsError(
            f"a run needs a folder of its own; {folder} already holds {', '.join(path.name for path in found)}."
            " Continue that run with --resume, replace it with --overwrite, or choose another folder with --out."
        )
    for path in found:
        path.unlink()


def _print_result(application: Application, result: "Result", folder: Path) -> None:
    if not result.finished:
        again = shlex.join(["nacre", "train", application.name, "--resume", str(folder / "last.ckpt")])
        print(f"stopped at step {result.step:,} of {result.steps:,}; go on with: {again}")
        return
    found = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in result.final.items())
    seconds = f"{result.seconds:.1f} s, {result.validation_seconds:.1f} s of them validation"
    print(f"{found}, after {result.steps:,} steps in {seconds}")
    if isinstance(application.data, TextData):
        vocabulary = application.data.vocabulary
        prompt = "\n" if "\n" in vocabulary.characters else vocabulary.characters[0]
        generator = torch.Generator().manual_seed(application.seed)
        text = generate(application.model, vocabulary, SAMPLE_LENGTH, prompt, temperature=0.8, generator=generator)
        print(f"it writes:\n{text.strip()}")


def _data_help(reads_text: bool) -> str:
    if reads_text:
        return "a text in UTF-8 (default: the source of Python's standard library)"
    return "a folder of IDX files, as MNIST's (default: scikit-learn's digits)"


def _default(text: str, value: object) -> str:
    return text if value is None else f"{text} (default: {value})"


def _positive_integer(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {text}")
    return value


def _positive_number(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number; got {text}")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1; got {text}")
    return value
