"""The limits of the machine: its best matrix product and its best copy."""

import time
from collections.abc import Callable
from functools import partial

import torch

from nacre.tools.bench.results import Ceilings
from nacre.tools.bench.selection import DTYPES, Settings

_REPEATS = 10
_LONGEST = 2.0  # seconds which one product may take: float16 has no fast product on some processors


def measure_ceilings(settings: Settings) -> Ceilings:
    """Measures both ceilings with torch's present number of threads."""
    return Ceilings(matrix_peak(DTYPES[settings.dtype], settings.matrix_size), copy_bandwidth(settings.copied_bytes))


def matrix_peak(dtype: torch.dtype, size: int) -> float:
    """FLOPs a second of the fastest product of two square matrices that torch offers, by MKL or by oneDNN."""
    return max(_flops_of(product, dtype, size) for product in (_by_mkl, _by_onednn))


def copy_bandwidth(size: int) -> float:
    """Bytes a second, read and written together, of copying into memory that the process keeps."""
    source = torch.ones(max(size // 4, 1))
    destination = torch.zeros_like(source)
    return 2 * source.nbytes / _least_seconds(lambda: destination.copy_(source))


def _by_mkl(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.mm(left, right.t())


def _by_onednn(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")


def _flops_of(product: Callable[..., torch.Tensor], dtype: torch.dtype, size: int) -> float:
    best = 0.0
    for side in (max(size // 8, 1), size):
        flops = 2 * side**3
        if best and flops / best > _LONGEST:
            break
        left, right = torch.randn(2, side, side).to(dtype)
        try:
            best = max(best, flops / _least_seconds(partial(product, left, right)))
        except (AttributeError, RuntimeError):  # a torch without oneDNN, a dtype that it does not multiply
            break
    return best


def _least_seconds(function: Callable[[], object]) -> float:
    function()
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
