"""Loads the compiled kernels once; without them the formulas serve."""

import functools
from pathlib import Path

import torch


@functools.cache
def unavailable() -> str:
    """Loads the compiled library on its first call; why it cannot be used, empty when it can.

    Example:
        >>> isinstance(unavailable(), str)
        True
    """
    folder = Path(__file__).parent.parent
    libraries = sorted(folder.glob("_kernels*.so")) + sorted(folder.glob("_kernels*.dll"))
    if not libraries:
        return "the C++ kernels were not built: install nacre where a C++ compiler is found"
    try:
        torch.ops.load_library(libraries[0])
    except OSError as error:
        return f"the C++ kernels could not be loaded: {error}"
    return ""
