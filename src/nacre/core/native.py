"""Loads the compiled kernels once; without them the formulas serve.

A kernel is compiled once for every instruction set, each into a library of its own, and torch tells which of them
this processor runs, so that the kernels and torch's own follow the same choice.
"""

import ctypes
import functools
from pathlib import Path

import torch

_INSTRUCTION_SETS = {"AVX512": ("avx512", "avx2", "baseline"), "AVX2": ("avx2", "baseline")}


@functools.cache
def unavailable() -> str:
    """Loads the compiled library on its first call; why it cannot be used, empty when it can.

    Example:
        >>> isinstance(unavailable(), str)
        True
    """
    path = find()
    if path is None:
        return (
            "the C++ kernels were not built: install nacre where torch and a C++ compiler are found, "
            "with pip install --no-build-isolation"
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"the C++ kernels could not be loaded: {error}"
    return ""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded library, for the plain functions that it has beside its operators; None when there is none.

    Example:
        >>> (library() is None) == bool(unavailable())
        True
    """
    return None if unavailable() else ctypes.CDLL(str(find()))


def find(folder: Path = Path(__file__).parent.parent) -> Path | None:
    """The compiled library for the best instruction set that this processor runs; None when none was built."""
    for instructions in _INSTRUCTION_SETS.get(torch.backends.cpu.get_cpu_capability(), ("baseline",)):
        for path in folder.glob(f"_kernels_{instructions}.*"):
            return path
    return None
