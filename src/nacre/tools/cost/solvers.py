"""Decompositions, triangular solves and Fourier transforms: the textbook's exact counts, where there are any.

What iterates until it is near enough (eigenvalues, singular values) or sorts has no count that its sizes decide; it is
named in a bill instead.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

Rule = Callable[[Mapping[str, Any], Any], "int | None"]


def factor_operations(rows: int) -> int:
    """Gaussian elimination: each of the ``k`` rows below a pivot takes 1 division, and 2 operations for ``k`` values.

    Example:
        >>> factor_operations(3)  # 2 divisions and 2 * 4, then 1 and 2 * 1
        13
    """
    return rows * (rows - 1) // 2 + rows * (rows - 1) * (2 * rows - 1) // 3


def cholesky_operations(rows: int) -> int:
    """Half of the elimination, with a root for each pivot: the sum of the squares up to ``rows``.

    Example:
        >>> cholesky_operations(2)  # 2 roots, a division, a multiplication and a subtraction
        5
    """
    return rows * (rows + 1) * (2 * rows + 1) // 6


def _matrices(matrix: Tensor) -> int:
    return math.prod(matrix.shape[:-2])


def _factor(more_by_row: int) -> Rule:
    def rule(given: Mapping[str, Any], result: Any) -> int:
        matrix = given["A"]
        rows = matrix.shape[-1]
        return _matrices(matrix) * (factor_operations(rows) + more_by_row * rows)

    return rule


def _cholesky(given: Mapping[str, Any], result: Any) -> int:
    matrix = given["self"]
    return _matrices(matrix) * cholesky_operations(matrix.shape[-1])


def _substitutions(matrix: str, count: int) -> Rule:
    """Forward or backward: n divisions and n (n - 1) multiplications and subtractions for each right-hand side."""

    def rule(given: Mapping[str, Any], result: Any) -> int:
        solution = result if isinstance(result, Tensor) else result[0]
        return count * solution.numel() * given[matrix].shape[-1]

    return rule


def _solve(given: Mapping[str, Any], result: Any) -> int:
    return _factor(0)(given, result) + 2 * result[0].numel() * given["A"].shape[-1]


def _fourier(given: Mapping[str, Any], result: Any) -> int | None:
    """5 n log2 n for n complex values: n / 2 butterflies of 10 operations, log2 n times; half of it for real ones."""
    values = given["self"]
    real = not (values.is_complex() and result.is_complex())
    whole = values if not values.is_complex() else result  # the side which holds all values, not half of them
    lengths = [whole.shape[axis] for axis in given["dim"]]
    if any(length < 1 or length & (length - 1) for length in lengths):
        return None
    operations = 5 * whole.numel() * sum(length.bit_length() - 1 for length in lengths)
    return operations // 2 if real else operations


SOLVERS: dict[str, Rule] = {
    "_linalg_det": _factor(1),
    "_linalg_slogdet": _factor(2),
    "linalg_lu_factor_ex": _factor(0),
    "linalg_cholesky_ex": _cholesky,
    "_linalg_solve_ex": _solve,
    "linalg_lu_solve": _substitutions("LU", 2),
    "linalg_solve_triangular": _substitutions("self", 1),
    "_fft_c2c": _fourier,
    "_fft_r2c": _fourier,
    "_fft_c2r": _fourier,
}
"""The operators of linear algebra and Fourier transforms with a count of their own, by their name."""
