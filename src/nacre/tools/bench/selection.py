"""Which cases are measured, and how long."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nacre.blocks import BLOCKS
from nacre.core import check
from nacre.core.spec import Case, LayerSpec
from nacre.layers import LAYERS

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """What to measure, as a child process is told.

    Args:
        names: of layers and blocks, or ``layer/case`` for one case; empty for all.
        dtype: a key of ``DTYPES``.
        all_cases: every case, not only those that users run.
        compile: measure torch.compile too.
        rounds: at most so many for a case.
        seconds: after which a case begins no further round, once it has had three.
        threads: of torch; None leaves torch's own choice.
        matrix_size: rows and columns of the product that gives the matrix peak.
        copied_bytes: size of the copy that gives the bandwidth.
    """

    names: tuple[str, ...] = ()
    dtype: str = "float32"
    all_cases: bool = False
    compile: bool = True
    rounds: int = 15
    seconds: float = 1.5
    threads: int | None = None
    matrix_size: int = 2048
    copied_bytes: int = 2**28

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise check.error(ValueError, f"nacre bench takes the dtypes {', '.join(DTYPES)}", repr(self.dtype))
        for name in ("rounds", "seconds", "threads"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise check.error(ValueError, f"{name} of a benchmark must be greater than 0", str(value))


def selected(names: Sequence[str] = (), all_cases: bool = False) -> list[tuple[LayerSpec, Case]]:
    """The cases that the names ask for, in the order of the names.

    Args:
        names: ``layer`` for the cases of a layer or block, ``layer/case`` for one of them. Default: every layer.
        all_cases: every case of a layer, not only those that users run. Default: False.

    Raises:
        ValueError: a name that no layer or case has.

    Example:
        >>> [case.name for _, case in selected(["layer_norm"])]
        ['small', 'image tokens', 'text']
    """
    specs = {**LAYERS, **BLOCKS}
    chosen = []
    for name in names or specs:
        layer, slash, wanted = name.partition("/")
        if layer not in specs:
            rule = "nacre bench takes names of layers and blocks"
            raise check.error(ValueError, rule, repr(layer), _fix(layer, list(specs)))
        cases = specs[layer].cases
        if slash:
            found = [case for case in cases if case.name == wanted]
            if not found:
                rule = f"the case of {name!r} must be one of {layer}'s"
                raise check.error(ValueError, rule, repr(wanted), _fix(wanted, [case.name for case in cases]))
        else:
            found = [case for case in cases if case.bench or all_cases]
        chosen += [(specs[layer], case) for case in found]
    return chosen


def _fix(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else f"There are {', '.join(known)}."
