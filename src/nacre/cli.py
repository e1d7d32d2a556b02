"""The command ``nacre``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nacre import __version__, threads
from nacre.applications import command as train_command
from nacre.tools.bench import command as bench_command
from nacre.tools.convert import convert
from nacre.tools.cost import command as cost_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status.

    Example:
        >>> main(["--version"])
        Traceback (most recent call last):
        SystemExit: 0
    """
    parser = _parser()
    parsed = parser.parse_args(arguments)
    try:
        status: int = parsed.function(parsed)
        return status
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("nacre"):
            raise
        print(f"nacre: {error}", file=sys.stderr)
        print("nacre: this command needs more packages: pip install 'nacre[all]'", file=sys.stderr)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"nacre: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("nacre: interrupted", file=sys.stderr)
        return train_command.INTERRUPTED
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nacre", description="Neural-network layers with nothing hidden.")
    parser.add_argument("--version", action="version", version=f"nacre {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    layers = commands.add_parser("layers", help="the comparison table of all layers, or pictures of them")
    layers.add_argument("--html", type=Path, metavar="FILE", help="write the visual overview as one page")
    layers.add_argument("--svg", type=Path, metavar="FOLDER", help="write each picture as an SVG file")
    layers.set_defaults(function=_layers)

    train = commands.add_parser("train", help="train an application")
    train_command.add_arguments(train)
    train.set_defaults(function=_train)

    bench = commands.add_parser("bench", help="time layers by torch.nn and by nacre against the machine's limit")
    bench_command.add_arguments(bench)
    bench.set_defaults(function=_bench)

    cost = commands.add_parser("cost", help="the bill of any model: parameters, FLOPs, memory, time, module by module")
    cost_command.add_arguments(cost)
    cost.set_defaults(function=_cost)

    demo = commands.add_parser("demo", help="check every layer, train a GPT with torch.nn and with nacre, compare")
    demo.add_argument("--data", type=Path, metavar="FILE", help="text to learn (default: Python's standard library)")
    demo.add_argument("--out", type=Path, metavar="FILE", default=Path("nacre_demo.html"), help="the page to write")
    demo.add_argument("--steps", type=_at_least_one, metavar="N", default=300, help="of each training (default: 300)")
    demo.add_argument("--seed", type=int, metavar="N", default=0, help="of weights and data order (default: 0)")
    demo.add_argument("--quick", action="store_true", help="30 steps, for a look at whether everything runs")
    demo.set_defaults(function=_demo)
    return parser


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 on; got {text}")
    return number


def _layers(arguments: argparse.Namespace) -> int:
    if not arguments.html and not arguments.svg:
        from nacre.tools.show import show_layers

        show_layers()
        return 0
    from nacre.tools.overview import page

    sheets = page.sheets()
    if arguments.html:
        page.write_page(arguments.html, sheets)
        print(f"The overview is {arguments.html}.")
    if arguments.svg:
        print(f"{len(page.write_pictures(arguments.svg, sheets))} pictures are in {arguments.svg}.")
    return 0


def _train(arguments: argparse.Namespace) -> int:
    threads.share()
    return train_command.run(arguments, lambda model: convert(model, to="torch"))


def _bench(arguments: argparse.Namespace) -> int:
    return bench_command.run(arguments)


def _cost(arguments: argparse.Namespace) -> int:
    return cost_command.run(arguments)


def _demo(arguments: argparse.Namespace) -> int:
    from nacre.tools.demo import demo

    threads.share()
    steps = 30 if arguments.quick else arguments.steps
    return 0 if demo(arguments.out, source=arguments.data, steps=steps, seed=arguments.seed) else 1


if __name__ == "__main__":
    sys.exit(main())
