"""Compares analytic gradients with finite differences and with a reference, tensor by tensor."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nacre.tools.gradcheck.hints import Evidence, likely_cause, swapped
from nacre.tools.gradcheck.numeric import DirectionMove, EntryMove, FiniteDifferences, Verdict
from nacre.tools.gradcheck.report import GradientResult
from nacre.tools.gradcheck.subject import Differentiable, EvaluationError, Leaf, differentiate
from nacre.tools.gradcheck.tensors import largest, same_values

REFERENCE_RTOL = 1e-10
"""Two float64 backwards differ by rounding alone: 4e5 eps leaves room for long sums and mild cancellation."""

ENOUGH = 8
"""Entries confirmed wrong at every step size, after which the rest of a tensor is judged at one step size."""


@dataclass(frozen=True)
class Settings:
    """The options of a check; see :func:`nacre.gradcheck`."""

    rtol: float
    atol: float
    max_entries: int
    samples: int
    directions: int
    seed: int


@dataclass
class Comparison:
    """A result and, for a wrong one, the values that show why."""

    result: GradientResult
    evidence: Evidence | None = None
    kinks: tuple[tuple[int, ...], ...] = ()


KINK_HINT = (
    "the function has a kink here, and the gradient is not between its one-sided slopes; where several kinks meet, "
    "autograd's choice for each may not add up to a choice for all"
)

UNSETTLED_HINT = (
    "the finite difference does not settle as its step shrinks: the function jumps here, or rounds to a low precision "
    "inside"
)

Gradients = dict[str, list[Tensor | None]]
"""For every output the gradient of every leaf."""


def incoming_gradients(outputs: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """For every output a random incoming gradient: of both signs, and nowhere so small that it could hide an error.

    It is zero where an output is infinite, as masked logarithms of probabilities are: they have no derivative.
    """
    return {
        name: torch.where(torch.isfinite(output.detach()), _random_like(output, generator), 0.0)
        for name, output in outputs.items()
    }


def analytic_gradients(subject: Differentiable, incoming: dict[str, Tensor]) -> Gradients:
    """The gradients by autograd and by the backwards that a user wrote."""
    gradients: Gradients = {}
    for name, output in subject.evaluate().items():
        if not output.requires_grad:
            gradients[name] = [None] * len(subject.leaves)
            continue
        given = incoming[name].clone()
        gradients[name] = differentiate([output], subject.leaves, [given])
        if not same_values(given, incoming[name]):
            raise EvaluationError("the backward modifies its incoming gradient in place; work on a copy of it")
    return gradients


def against_differences(
    subject: Differentiable, incoming: dict[str, Tensor], gradients: Gradients, settings: Settings
) -> tuple[list[Comparison], list[str]]:
    """Compares every gradient with finite differences; also returns what is to be said about the comparison."""
    differences = FiniteDifferences(subject, incoming, settings.rtol, settings.atol)
    generator = torch.Generator().manual_seed(settings.seed)
    comparisons, notes = [], []
    for number, leaf in enumerate(subject.leaves):
        found = {output: values[number] for output, values in gradients.items()}
        finite = torch.isfinite(leaf.tensor.detach()).flatten()
        positions = finite.nonzero().flatten()
        if len(positions) < leaf.tensor.numel():
            notes.append(f"{leaf.name}: entries which are not finite are left as they are and not compared")
        sampled = len(positions) > settings.max_entries
        if sampled:
            chosen = torch.randperm(len(positions), generator=generator)[: settings.samples]
            positions = positions[chosen.sort().values.to(positions.device)]
            notes.append(
                f"{leaf.name}: {len(positions)} of its {leaf.tensor.numel()} entries and {settings.directions} random "
                f"directions were compared (seed {settings.seed})"
            )
        comparisons += _entries(differences, leaf, found, positions.tolist())
        if sampled:
            comparisons += _directions(differences, leaf, found, finite, settings.directions, generator)
    _mark_swapped(comparisons)
    return comparisons, notes


def against_reference(
    leaves: Sequence[Leaf], gradients: Gradients, reference: Gradients, differences: list[Comparison]
) -> list[Comparison]:
    """Compares every entry of every gradient with the reference's; entries at a kink are left to the differences."""
    kinks = {(found.result.name, found.result.output): found.kinks for found in differences if found.kinks}
    comparisons = []
    for output, expected in reference.items():
        most = max(largest(value) for value in expected)
        for leaf, mine, theirs in zip(leaves, gradients[output], expected, strict=True):
            analytic, wanted = _filled(mine, leaf), _filled(theirs, leaf)
            # a gradient that is zero by cancellation carries the rounding of the others
            tolerance = REFERENCE_RTOL * largest(wanted) + 64 * torch.finfo(torch.float64).eps * most
            for index in kinks.get((leaf.name, output), ()):
                wanted[index] = analytic[index]
            verdicts = [
                Verdict(abs(a - w) <= tolerance, w, tolerance)
                for a, w in zip(analytic.flatten().tolist(), wanted.flatten().tolist(), strict=True)
            ]
            positions = range(leaf.tensor.numel())
            comparisons.append(_summarise(leaf, output, "reference", mine, positions, verdicts, REFERENCE_RTOL, {}))
    _mark_swapped(comparisons)
    return comparisons


def _entries(
    differences: FiniteDifferences, leaf: Leaf, gradients: dict[str, Tensor | None], positions: list[int]
) -> list[Comparison]:
    analytic = {output: _filled(gradient, leaf).flatten()[positions] for output, gradient in gradients.items()}
    values = {output: chosen.tolist() for output, chosen in analytic.items()}
    scale = {output: largest(chosen) for output, chosen in analytic.items()}
    verdicts: dict[str, list[Verdict]] = {output: [] for output in gradients}
    suspects: dict[int, float] = {}
    for row, position in enumerate(positions):
        for output, slopes in differences.slopes(EntryMove(leaf.tensor, position)).items():
            verdict, suspicious = differences.first_look(values[output][row], slopes, scale[output])
            verdicts[output].append(verdict)
            if suspicious:
                suspects[row] = max(suspects.get(row, 0.0), verdict.excess(values[output][row]))
    confirmed = 0
    for row in sorted(suspects, key=lambda row: -suspects[row]):
        if confirmed == ENOUGH:
            break
        rungs = differences.ladder(EntryMove(leaf.tensor, positions[row]))
        for output in gradients:
            along = [rung[output] for rung in rungs]
            first = verdicts[output][row]
            verdicts[output][row] = differences.closer_look(first, values[output][row], along, scale[output])
        confirmed += not all(verdicts[output][row].ok for output in gradients)
    comparisons = []
    for output, gradient in gradients.items():
        wrong = [row for row, verdict in enumerate(verdicts[output]) if not verdict.ok]
        wrong = sorted(wrong, key=lambda row: -verdicts[output][row].excess(values[output][row]))[:3]
        terms = {row: differences.terms(EntryMove(leaf.tensor, positions[row]), output) for row in wrong}
        comparisons.append(
            _summarise(
                leaf, output, "finite differences", gradient, positions, verdicts[output], differences.rtol, terms
            )
        )
    return comparisons


def _directions(
    differences: FiniteDifferences,
    leaf: Leaf,
    gradients: dict[str, Tensor | None],
    finite: Tensor,
    count: int,
    generator: torch.Generator,
) -> list[Comparison]:
    values: dict[str, list[float]] = {output: [] for output in gradients}
    verdicts: dict[str, list[Verdict]] = {output: [] for output in gradients}
    places: dict[str, tuple[int, float, Verdict]] = {}
    units = leaf.tensor.detach().abs().clamp(min=1.0) * finite.reshape(leaf.tensor.shape)
    for _ in range(count):
        direction = (_random_like(leaf.tensor, generator) * units).nan_to_num()
        for output, gradient in gradients.items():
            analytic, verdict = _along(differences, leaf, _filled(gradient, leaf), direction, output)
            values[output].append(analytic)
            verdicts[output].append(verdict)
            if not verdict.ok and output not in places:
                place = _trace(differences, leaf, _filled(gradient, leaf), direction, output)
                if place is not None:
                    places[output] = place
    comparisons = []
    for output in gradients:
        result, _ = _result(leaf, output, "random directions", values[output], verdicts[output], differences.rtol)
        if output in places:
            position, analytic, verdict = places[output]
            result = replace(
                result,
                index=EntryMove(leaf.tensor, position).index,
                analytic=analytic,
                expected=verdict.expected,
                tolerance=verdict.tolerance,
            )
        comparisons.append(Comparison(result))
    return comparisons


def _along(
    differences: FiniteDifferences, leaf: Leaf, gradient: Tensor, direction: Tensor, output: str
) -> tuple[float, Verdict]:
    move = DirectionMove(leaf.tensor, direction)
    analytic = _product(gradient, direction)
    verdict, suspicious = differences.first_look(analytic, differences.slopes(move)[output], abs(analytic))
    if suspicious:
        rungs = [rung[output] for rung in differences.ladder(move)]
        verdict = differences.closer_look(verdict, analytic, rungs, abs(analytic))
    return analytic, verdict


def _product(gradient: Tensor, direction: Tensor) -> float:
    # entries that are not finite do not move, whatever their gradient
    return float(torch.where(direction == 0, 0.0, gradient * direction).sum())


def _trace(
    differences: FiniteDifferences, leaf: Leaf, gradient: Tensor, direction: Tensor, output: str
) -> tuple[int, float, Verdict] | None:
    """Follows an error along a direction to one entry, halving the set of entries that are moved."""
    first, last = 0, leaf.tensor.numel()
    while last - first > 1:
        middle = (first + last) // 2
        errors = []
        for start, stop in ((first, middle), (middle, last)):
            part = torch.zeros_like(direction).flatten()
            part[start:stop] = direction.flatten()[start:stop]
            part = part.reshape(direction.shape)
            slopes = differences.slopes(DirectionMove(leaf.tensor, part))[output]
            errors.append(abs(_product(gradient, part) - slopes.central))
        first, last = (first, middle) if errors[0] >= errors[1] else (middle, last)
    analytic = float(gradient.flatten()[first])
    move = EntryMove(leaf.tensor, first)
    scale = largest(gradient)
    verdict, _ = differences.first_look(analytic, differences.slopes(move)[output], scale)
    verdict = differences.closer_look(verdict, analytic, [rung[output] for rung in differences.ladder(move)], scale)
    return None if verdict.ok else (first, analytic, verdict)


def _summarise(
    leaf: Leaf,
    output: str,
    comparison: str,
    gradient: Tensor | None,
    positions: Sequence[int],
    verdicts: list[Verdict],
    rtol: float,
    terms: dict[int, Tensor],
) -> Comparison:
    analytic = _filled(gradient, leaf).flatten()[list(positions)]
    values = analytic.tolist()
    result, worst = _result(leaf, output, comparison, values, verdicts, rtol)
    if worst is None:
        return Comparison(result)
    result = replace(result, index=EntryMove(leaf.tensor, positions[worst]).index)
    kinks = tuple(
        EntryMove(leaf.tensor, position).index
        for position, verdict in zip(positions, verdicts, strict=True)
        if verdict.kink
    )
    if result.ok:
        return Comparison(result, kinks=kinks)
    whole = leaf.tensor.shape if len(positions) == leaf.tensor.numel() else analytic.shape
    evidence = Evidence(
        analytic.cpu().reshape(whole),
        torch.tensor([verdict.expected for verdict in verdicts], dtype=torch.float64).reshape(whole),
        torch.tensor([verdict.tolerance for verdict in verdicts], dtype=torch.float64).reshape(whole),
        tuple(leaf.tensor.shape),
        gradient is None,
        tuple((values[row], found.cpu()) for row, found in terms.items()),
    )
    if not verdicts[worst].settled:
        hint = UNSETTLED_HINT
    else:
        hint = KINK_HINT if verdicts[worst].kink else likely_cause(evidence)
    return Comparison(replace(result, hint=hint), evidence, kinks)


def _result(
    leaf: Leaf, output: str, comparison: str, values: list[float], verdicts: list[Verdict], rtol: float
) -> tuple[GradientResult, int | None]:
    """The result without index and hint, and the row which is worst in units of its tolerance."""
    result = GradientResult(leaf.name, output, comparison, True, len(verdicts), leaf.tensor.numel())
    if not verdicts:
        return result, None
    errors = [abs(value - verdict.expected) for value, verdict in zip(values, verdicts, strict=True)]
    relative = []
    for error, value, verdict in zip(errors, values, verdicts, strict=True):
        larger = max(abs(value), abs(verdict.expected))
        # what the tolerance allows beyond rtol is the comparison's own error
        floor = max(larger, verdict.tolerance / rtol - larger)
        relative.append(error / floor if floor else error)
    worst = max(range(len(verdicts)), key=lambda row: verdicts[row].excess(values[row]))
    result = replace(
        result,
        ok=all(verdict.ok for verdict in verdicts),
        wrong=sum(not verdict.ok for verdict in verdicts),
        kinks=sum(verdict.kink for verdict in verdicts),
        max_absolute_error=_greatest(errors),
        max_relative_error=_greatest(relative),
        analytic=values[worst],
        expected=verdicts[worst].expected,
        tolerance=verdicts[worst].tolerance,
    )
    return result, worst


def _greatest(errors: list[float]) -> float:
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def _mark_swapped(comparisons: list[Comparison]) -> None:
    wrong = [found for found in comparisons if found.evidence is not None]
    for first in wrong:
        for second in wrong:
            if first is second or first.result.output != second.result.output:
                continue
            if first.evidence and second.evidence and swapped(first.evidence, second.evidence):
                hint = f"the gradients of {first.result.name} and {second.result.name} are swapped"
                first.result = replace(first.result, hint=hint)


def vanishing_gradients(leaves: Sequence[Leaf], gradients: Gradients, comparisons: list[Comparison]) -> list[str]:
    """What is to be said of right gradients that are zero for every output: a layer is rarely meant so."""
    notes = []
    for number, leaf in enumerate(leaves):
        results = [found.result for found in comparisons if found.result.name == leaf.name]
        if leaf.tensor.numel() == 0 or not all(result.ok for result in results):
            continue
        sizes = {output: largest(found[number]) for output, found in gradients.items()}
        if not any(sizes.values()):
            notes.append(
                f"{leaf.name}: the gradient is zero, as are finite differences; the output does not depend on it, "
                "or in steps only"
            )
        elif all(sizes[result.output] <= result.tolerance for result in results):
            notes.append(
                f"{leaf.name}: the gradient, of {max(sizes.values()):.0e} at most, is too small for finite differences "
                "to tell from zero"
            )
    return notes


def _filled(gradient: Tensor | None, leaf: Leaf) -> Tensor:
    return torch.zeros_like(leaf.tensor).detach() if gradient is None else gradient.detach().to(torch.float64)


def _random_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Random values of both signs and absolute values from 0.5 to 1.5, the same on every device."""
    size = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5
    sign = torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1
    return (size * sign).to(tensor.device)
