"""The command ``nacre cost``: its arguments, and what it does with them."""

import argparse
import copy
import json
import os
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nacre.applications.files import replacing
from nacre.core import check
from nacre.tools.bench.selection import DTYPES
from nacre.tools.convert import convert
from nacre.tools.cost.compare import Comparison, compare
from nacre.tools.cost.report import CostReport
from nacre.tools.cost.run import CostError, cost
from nacre.tools.cost.target import Shape, Target, find_target, first_line, shape

LAYERS = ("nacre", "torch")


class _Input(argparse.Action):
    """Inputs in the order in which they stand on the command line, of either kind."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        namespace.inputs = [*(namespace.inputs or []), (values, option == "--tokens")]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Gives ``parser`` the arguments of ``nacre cost``.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_arguments(parser)
        >>> parser.parse_args(["gpt", "--tokens", "4x64"]).inputs
        [('4x64', True)]
    """
    parser.add_argument(
        "target",
        metavar="TARGET",
        nargs="?",
        help="package.module:factory (a function without arguments, or a model), a Hugging Face config.json,"
        " or an application's name",
    )
    parser.add_argument(
        "--input",
        action=_Input,
        dest="inputs",
        metavar="8x3x32x32",
        help="an input of numbers; with NAME= before the shape, the input of that name",
    )
    parser.add_argument(
        "--tokens", action=_Input, dest="inputs", metavar="4x512", help="the same of token numbers, all of them zero"
    )
    parser.add_argument("--dtype", choices=list(DTYPES), help="of the model (default: as it is built)")
    parser.add_argument("--eval", action="store_true", help="the bill of evaluation, without a backward")
    parser.add_argument("--depth", type=_depth, metavar="N", help="leave out of the table what lies deeper")
    parser.add_argument("--predict", action="store_true", help="tell the time to expect on this machine")
    parser.add_argument("--measure", action="store_true", help="time every module on this machine")
    parser.add_argument(
        "--against",
        metavar="TARGET",
        help="another target to compare with; 'nacre' or 'torch' for the same model of the other's layers",
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the bill as a page, with the time to expect")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON")
    parser.add_argument(
        "--check-predictions",
        action="store_true",
        help="instead: predict and measure a training step of many models on this machine, and print the errors",
    )
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")


def _depth(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"a whole number from 0 on; got {text}")
    return int(text)


def run(arguments: argparse.Namespace) -> int:
    """Bills, prints and writes what the arguments ask for.

    Returns:
        The exit status, 0.

    Raises:
        ValueError: whatever was wrong, in one line.
        OSError: a file cannot be read or written.
    """
    try:
        _run(arguments)
    except (ModuleNotFoundError, OSError):
        raise
    except Exception as error:
        if arguments.debug:
            traceback.print_exc()
        said = first_line(error)
        raise ValueError(said if isinstance(error, ValueError) else f"{type(error).__name__}: {said}") from error
    return 0


def _run(arguments: argparse.Namespace) -> None:
    for path in (arguments.html, arguments.json):
        if path is not None and not path.parent.is_dir():
            raise check.error(ValueError, "files are written into folders that are there", str(path))
        if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK)):
            rule = "files are written where a file may be"
            raise check.error(ValueError, rule, f"{path}, {'a folder' if path.is_dir() else 'in a closed folder'}")
    if arguments.against and arguments.html:
        fix = "Leave one of the two out, or take --json."
        raise check.error(ValueError, "the page shows one bill", "--html with --against", fix)
    if arguments.check_predictions:
        _check_predictions(arguments)
        return
    if arguments.target is None:
        fix = "Give package.module:factory, a config.json or an application's name, or --check-predictions."
        raise check.error(ValueError, "nacre cost bills a model", "none", fix)
    report = _bill(find_target(arguments.target), arguments)
    if arguments.against is None:
        print(report.table(arguments.depth))
        found: CostReport | Comparison = report
    else:
        found = compare(report, _other(arguments))
        print(found.table(arguments.depth))
    if arguments.html is not None:
        report.html(arguments.html)
    if arguments.json is not None:
        with replacing(arguments.json) as partial:
            partial.write_text(json.dumps(found.to_json(), indent=1), encoding="utf-8")


def _check_predictions(arguments: argparse.Namespace) -> None:
    from tqdm import tqdm

    from nacre.tools.cost import models, predictions

    if arguments.target or arguments.html or arguments.against:
        rule = "--check-predictions has models of its own"
        raise check.error(ValueError, rule, "a TARGET, --html or --against", "Leave it out.")
    with tqdm(total=len(models.MODELS), desc="checking", unit="model", leave=False) as bar:

        def progress(name: str) -> None:
            bar.set_postfix_str(name)
            bar.update()

        checked = predictions.check(models.MODELS, progress)
    print(predictions.markdown(checked))
    if arguments.json is not None:
        with replacing(arguments.json) as partial:
            partial.write_text(json.dumps([vars(one) for one in checked], indent=1), encoding="utf-8")


def _other(arguments: argparse.Namespace) -> CostReport:
    if arguments.against in LAYERS:
        return _bill(find_target(arguments.target), arguments, layers=arguments.against)
    return _bill(find_target(arguments.against), arguments)


def _bill(target: Target, arguments: argparse.Namespace, layers: str | None = None) -> CostReport:
    described = [shape(text, tokens) for text, tokens in arguments.inputs or []] or list(target.inputs)
    if not described:
        rule = f"{target.name} needs to be told its inputs"
        fix = "Give the shape of each: --input 8x3x32x32 for numbers, --tokens 4x512 for token numbers."
        raise check.error(ValueError, rule, "none", fix)
    device = "cpu" if arguments.measure else "meta"
    model = _model(target, arguments, layers, device)
    inputs, named = _inputs(described, model, device)
    try:
        report = cost(model, *inputs, **named)
    except CostError as error:
        if device == "cpu" or "decides by values" not in str(error):
            raise
        model = _model(target, arguments, layers, "cpu")
        inputs, named = _inputs(described, model, "cpu")
        report = cost(model, *inputs, **named)
    if arguments.measure:
        _measure(report, model, inputs, named)
    elif arguments.predict or arguments.html:
        report.predict()
    return report


def _model(target: Target, arguments: argparse.Namespace, layers: str | None, device: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = target.model(device)
    if arguments.dtype is not None:
        model = model.to(DTYPES[arguments.dtype])
    if layers is not None:
        model = convert(copy.deepcopy(model), to=layers)
    return model.eval().requires_grad_(False) if arguments.eval else model.train()


def _inputs(described: list[Shape], model: nn.Module, device: str) -> tuple[list[Tensor], dict[str, Any]]:
    """The inputs by position, and those by name."""
    dtypes = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    dtype = next(dtypes, torch.get_default_dtype())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = [(one.name, one.make(dtype, device)) for one in described]
    return [tensor for name, tensor in made if not name], {name: tensor for name, tensor in made if name}


def _measure(report: CostReport, model: nn.Module, inputs: list[Tensor], named: dict[str, Any]) -> None:
    from tqdm import tqdm

    from nacre.tools.cost.measure import measure_rows

    with tqdm(total=len(report.rows), desc="measuring", unit="call", leave=False) as bar:

        def progress(done: int, of: int, name: str) -> None:
            bar.set_postfix_str(name)
            bar.update(done - bar.n)

        measure_rows(report, model, inputs, named, progress)
