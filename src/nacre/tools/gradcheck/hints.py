"""Likely causes of a wrong gradient, recognised from its values beside the right ones."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Evidence:
    """The values of one gradient that was found wrong.

    Attributes:
        analytic: the values of the backward.
        expected: those they should equal; in the tensor's shape where every entry was compared, else a list.
        tolerance: for each entry, below which both are equal.
        shape: of the tensor.
        missing: whether the backward returned no gradient at all.
        terms: for some wrong entries, analytic value and the derivative's terms, one for each entry of the output.
    """

    analytic: Tensor
    expected: Tensor
    tolerance: Tensor
    shape: tuple[int, ...]
    missing: bool = False
    terms: tuple[tuple[float, Tensor], ...] = ()

    def equal(self, left: Tensor, right: Tensor, factor: float = 1.0) -> bool:
        return left.shape == right.shape and bool(((left - right).abs() <= 4 * factor * self.tolerance).all())


def likely_cause(evidence: Evidence) -> str:
    """The first pattern that explains every entry; empty where none does."""
    if not torch.isfinite(evidence.analytic).all():
        return "the gradient is not finite"
    if not torch.isfinite(evidence.expected).all():
        return "the function is not finite on both sides: this point is at the edge of its domain"
    for pattern in _PATTERNS:
        if cause := pattern(evidence):
            return cause
    return ""


def swapped(first: Evidence, second: Evidence) -> bool:
    """Whether each of two gradients has the values that belong to the other."""
    return first.equal(first.analytic, second.expected) and second.equal(second.analytic, first.expected)


def _missing(evidence: Evidence) -> str:
    if evidence.missing:
        return "the gradient is missing: the backward returns None for it, or the graph is cut (detach, .data, no_grad)"
    return "" if evidence.analytic.any() else "the gradient is missing: the backward gives zeros"


def _steps(evidence: Evidence) -> str:
    if evidence.expected.any():
        return ""
    return (
        "the function does not change in small steps: it is piecewise constant (rounding, comparison, argmax), "
        "rounds to a low precision inside, or does not depend on this tensor"
    )


def _constant_factor(evidence: Evidence) -> str:
    analytic, expected = evidence.analytic, evidence.expected
    factor = float((analytic * expected).sum() / expected.square().sum())
    if factor == 0 or not evidence.equal(analytic, factor * expected, max(1.0, abs(factor))):
        return ""
    if evidence.equal(analytic, -expected):
        return "the sign is flipped"
    for what, size in _sizes(evidence):
        # a factor of 2 has too many other reasons
        if size > 2 and abs(factor * size - 1) < 1e-4:
            return f"off by a factor of 1/{size}, {what}: a mean where a sum belongs"
        if size > 2 and abs(factor / size - 1) < 1e-4:
            return f"off by a factor of {size}.0, {what}: a sum where a mean belongs"
    whole = abs(factor - round(factor)) < 1e-4
    return f"off by a factor of {factor:.1f}" if whole else f"off by a factor of {factor:.6g}"


def _sizes(evidence: Evidence) -> Iterator[tuple[str, int]]:
    """Sizes which a mean divides by."""
    yield from ((f"the size of dimension {d} of the tensor", size) for d, size in enumerate(evidence.shape))
    if evidence.terms:
        output = evidence.terms[0][1]
        yield from ((f"the size of dimension {d} of the output", size) for d, size in enumerate(output.shape))
        yield "the number of entries of the output", output.numel()


def _moved(evidence: Evidence) -> str:
    analytic, expected = evidence.analytic, evidence.expected
    dimensions = range(min(expected.dim(), 4))
    for first, second in itertools.combinations(dimensions, 2):
        if evidence.equal(analytic, expected.transpose(first, second)):
            return "transposed" if expected.dim() == 2 else f"dimensions {first} and {second} are transposed"
    if expected.dim() == 2 and evidence.equal(analytic, expected.t().reshape(expected.shape)):
        return "transposed: the values of the transpose, laid out in this shape"
    for count in range(1, len(dimensions) + 1):
        for reversed_dimensions in itertools.combinations(dimensions, count):
            if evidence.equal(analytic, expected.flip(reversed_dimensions)):
                return f"reversed along dimension{'s' * (count > 1)} {', '.join(map(str, reversed_dimensions))}"
    return ""


def _offset(evidence: Evidence) -> str:
    difference = evidence.expected - evidence.analytic
    for dimension in reversed(range(difference.dim())):
        if difference.shape[dimension] > 1:
            constant = difference.mean(dimension, keepdim=True).expand_as(difference)
            if evidence.equal(difference, constant):
                return (
                    f"off by a term that is the same all along dimension {dimension}: "
                    "a mean or a sum over it is forgotten, or too many"
                )
    return ""


def _scaled(evidence: Evidence) -> str:
    for dimension in reversed(range(evidence.expected.dim())):
        if evidence.expected.dim() > 1 and evidence.expected.shape[dimension] > 1:
            product = (evidence.analytic * evidence.expected).sum(dimension, keepdim=True)
            factor = (product / evidence.expected.square().sum(dimension, keepdim=True)).nan_to_num()
            if evidence.equal(evidence.analytic, factor * evidence.expected, max(1.0, float(factor.abs().max()))):
                return (
                    f"off by a factor that is the same all along dimension {dimension}: a scale forgotten or too many"
                )
    return ""


def _unsummed(evidence: Evidence) -> str:
    """Each wrong value is the part of the sum that comes from one slice of the output."""
    if len(evidence.terms) < 2:
        return ""
    tolerance = 4 * float(evidence.tolerance.max())
    for dimension in range(evidence.terms[0][1].dim()):
        matches = []
        for analytic, terms in evidence.terms:
            parts = terms.sum([d for d in range(terms.dim()) if d != dimension]) if terms.dim() > 1 else terms
            matches.append((parts - analytic).abs() <= tolerance)
        common = torch.stack(matches).all(0)
        if len(common) > 1 and common.any():
            slice_number = int(common.nonzero()[0])
            return (
                f"not summed over dimension {dimension} of the output: only its slice {slice_number} contributes, "
                "and the tensor is broadcast along it"
            )
    return ""


def _partly_zero(evidence: Evidence) -> str:
    wrong = (evidence.analytic - evidence.expected).abs() > evidence.tolerance
    if wrong.all() or evidence.analytic[wrong].any():
        return ""
    return "zero at the wrong entries and right at the others: a part of the gradient is lost, or stopped on purpose"


def _low_precision(evidence: Evidence) -> str:
    error = (evidence.analytic - evidence.expected).abs().max()
    if error <= 1e-5 * evidence.expected.abs().max():
        return "the error has the size of float32 rounding: something is computed in float32"
    return ""


_PATTERNS = (
    _missing,
    _steps,
    _constant_factor,
    _moved,
    _offset,
    _partly_zero,
    _scaled,
    _unsummed,
    _low_precision,
)
