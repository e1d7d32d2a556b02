"""The elementary functions of the CPU kernels: their largest errors, in units in the last place, and special values."""

import ctypes
import math

import numpy as np
import pytest
import torch

from nacre.core import native

pytestmark = pytest.mark.skipif(
    native.unavailable() != "", reason="without kernels the formulas call torch's functions"
)

FUNCTIONS = ["exp", "exp2_of_negative", "log", "tanh", "sigmoid", "erf"]
# the bounds that cpu_math.h states
ULP = {"exp": 1.5, "exp2_of_negative": 1.5, "log": 1.5, "tanh": 2.0, "sigmoid": 2.5, "erf": 2.0}
# float32 bit patterns lie this far apart: some 2^22 of them, over all signs, exponents and kinds of NaN
STRIDE = 1021
every = pytest.mark.parametrize("name", FUNCTIONS)


def apply(name: str, x: np.ndarray) -> np.ndarray:
    x = np.ascontiguousarray(x)
    y = np.full_like(x, np.nan)
    function = getattr(native.library(), f"nacre_{name}_{x.dtype}")
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    function.restype = None
    function(x.ctypes.data, y.ctypes.data, x.size)
    return y


def exact(name: str, x: np.ndarray) -> np.ndarray:
    """In a wider type than x: float64 from torch, or numpy's long double."""
    name = name.removesuffix("_of_negative")
    if x.dtype == np.float32:
        return getattr(torch, name)(torch.from_numpy(x).double()).numpy()
    wide = x.astype(np.longdouble)
    if name == "sigmoid":
        power = np.exp(-np.abs(wide))
        return np.where(wide < 0, power, np.longdouble(1)) / (1 + power)
    if name == "erf":  # the kernels call the C library's
        return np.array([math.erf(value) for value in x], np.longdouble)
    return getattr(np, name)(wide)


def errors(y: np.ndarray, judge: np.ndarray) -> np.ndarray:
    """In units in the last place of the judge's value; a subnormal value's last place is the smallest number."""
    limits = np.finfo(y.dtype)
    places = np.frexp(np.abs(judge))[1] - 1
    unit = np.ldexp(judge.dtype.type(1), np.maximum(places, limits.minexp) - limits.nmant)
    return np.abs(y.astype(judge.dtype) - judge) / unit


def check(name: str, x: np.ndarray, bound: float) -> None:
    if name.endswith("_of_negative"):
        x = -np.abs(x)
    with np.errstate(all="ignore"):
        y, judge = apply(name, x), exact(name, x)
        rounded = judge.astype(x.dtype)
    assert np.array_equal(np.isnan(y), np.isnan(rounded))
    # at the edge of the range both the largest number and infinity are within the bound
    infinite = np.isinf(y) | np.isinf(rounded)
    largest = np.finfo(x.dtype).max
    assert np.array_equal(np.clip(y[infinite], -largest, largest), np.clip(rounded[infinite], -largest, largest))
    measured = ~np.isnan(rounded) & ~infinite
    assert np.array_equal(np.signbit(y[measured]), np.signbit(rounded[measured]))
    if not measured.any():
        return
    error = errors(y[measured], judge[measured])
    worst = error.argmax()
    assert error[worst] <= bound, f"{name}({x[measured][worst]!r}): {error[worst]:.3f} ulp"


@every
def test_error_over_the_whole_float32_range(name):
    patterns = np.arange(0, 2**32, STRIDE, dtype=np.int64)
    for chunk in np.array_split(patterns, 8):
        check(name, chunk.astype(np.uint32).view(np.float32), ULP[name])


@every
def test_error_where_float32_has_most_to_do(name):
    check(name, np.linspace(-110, 110, 1_000_003, dtype=np.float32), ULP[name])
    check(name, np.linspace(-5, 5, 1_000_003, dtype=np.float32), ULP[name])


@every
def test_error_of_float64(name):
    generator = np.random.default_rng(0)
    spread = generator.standard_normal(100_003) * 10.0 ** generator.uniform(-320, 3, 100_003)
    check(name, np.concatenate([spread, np.linspace(-760, 760, 100_003), np.linspace(-3, 3, 100_003)]), ULP[name])


@every
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_special_values(name, dtype):
    limits = np.finfo(dtype)
    smallest, largest = limits.smallest_subnormal, limits.max
    x = np.array([math.nan, math.inf, -math.inf, 0.0, -0.0, smallest, -smallest, largest, -largest, 1.0], dtype)
    check(name, x, ULP[name])
