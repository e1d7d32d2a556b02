"""Loads the compiled kernels once; without them the formulas serve.

A kernel is compiled once for every instruction set, each into a library of its own, and torch tells which of them
this processor runs, so that the kernels and torch's own follow the same choice. Autograd's part of a call
(core/autograd.cpp) is one more library, for the one version of torch that it was built with; with any other, and
without it, Python's serves.
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


@functools.cache
def records() -> bool:
    """Loads the library that records the kernels' calls for autograd on its first call; whether there is one.

    Example:
        >>> records() in (True, False)
        True
    """
    folder = Path(__file__).parent.parent
    paths = list(folder.glob(f"_autograd_{torch.__version__.partition('+')[0]}.*"))
    if not paths:
        return False
    try:
        torch.ops.load_library(paths[0])
    except OSError:  # built for a torch of the same version but of another build
        return False
    return True
