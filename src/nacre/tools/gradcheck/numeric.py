r"""Derivatives by finite differences, with an error estimate, and what they say about an analytic gradient.

Every output y is weighed with a fixed random v (its incoming gradient), so that an entry x_i has one derivative,

    d(v . y)/dx_i  =  (v . y(x + h e_i) - v . y(x - h e_i)) / 2h  +  truncation h^2 y''' / 6  +  rounding eps |y| / h.

The sum of the two errors is least where h is about the cube root of eps, 6e-6 in float64; here h = 2^-17 u, with u the
power of two nearest to max(1, |x_i|). As a power of two it adds to x_i without rounding. A smooth y is then known to
about 1e-10 of its size, and one pair of evaluations settles the entry.

An entry which does not agree, or whose one-sided slopes differ, gets a closer look: the same differences at eight
steps, each 8 times the last, from h / 512 to 4096 h. From one to the next truncation grows 64 times and rounding falls
8 times, so the changes along this ladder measure both. What it tells apart:

- a smooth function: the best step's value is compared, within its own estimated error;
- a kink (ReLU at 0): the one-sided slopes differ, and by no more at a smaller step. Any value between them is a
  subgradient, for each entry of the output on its own;
- rounding to a lower precision inside: the best step is a large one, and its estimated error says how much it proves;
- a jump: no step settles the value, and no verdict "right" is given.

Nocedal, Wright, "Numerical Optimization", 2nd edition, section 8.1.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nacre.tools.gradcheck.subject import Differentiable, EvaluationError
from nacre.tools.gradcheck.tensors import largest

EPSILON = torch.finfo(torch.float64).eps
STEP = 2.0**-17
LADDER = tuple(STEP * 8.0**rung for rung in range(-3, 5))
ROUNDING = 64 * EPSILON
"""Assumed rounding error of an output, relative to its largest entry: sums of thousands of terms stay below."""

UNSETTLED = 1e-2
"""A derivative known no better than to this part of its tensor's scale proves nothing."""


class EntryMove:
    """Moves one entry of a tensor, in units of the power of two nearest to max(1, |entry|)."""

    def __init__(self, tensor: Tensor, position: int) -> None:
        self._tensor = tensor.data
        self.index = _index(position, tensor.shape)
        self._value = float(self._tensor[self.index])
        self.unit = 2.0 ** round(math.log2(max(1.0, abs(self._value))))

    def to(self, distance: float) -> None:
        self._tensor[self.index] = self._value + distance * self.unit


def _index(position: int, shape: Sequence[int]) -> tuple[int, ...]:
    index = []
    for size in reversed(shape):
        position, along = divmod(position, size)
        index.append(along)
    return tuple(reversed(index))


class DirectionMove:
    """Moves all entries of a tensor along a direction."""

    unit = 1.0

    def __init__(self, tensor: Tensor, direction: Tensor) -> None:
        self._tensor, self._start, self._direction = tensor.data, tensor.detach().clone(), direction

    def to(self, distance: float) -> None:
        self._tensor.copy_(self._start + distance * self._direction)


Move = EntryMove | DirectionMove


@dataclass(frozen=True)
class Slopes:
    """Finite differences of one weighed output along one move, over steps of one size.

    Attributes:
        step: the step, in the units of the tensor's entries.
        central: the central difference.
        low: the sum of the lesser of both one-sided slopes, taken for each entry of the output on its own.
        high: the sum of the greater.
        size: the sum of the slopes' absolute values.
        noise: what rounding the output in float64 is expected to do to ``central`` at most; errors of the output's
            entries are taken as independent.
    """

    step: float
    central: float
    low: float
    high: float
    size: float
    noise: float

    @property
    def gap(self) -> float:
        return self.high - self.low


@dataclass(frozen=True)
class Verdict:
    """What finite differences, or a reference, say about one analytic value.

    Attributes:
        ok: whether it is right.
        expected: the value it should have; NaN where there is none.
        tolerance: how far from it is still right.
        kink: whether the function has a kink here.
        settled: whether the differences approach a value as the step shrinks; of one step size, whether nothing
            speaks against it.
    """

    ok: bool
    expected: float
    tolerance: float
    kink: bool = False
    settled: bool = True

    def excess(self, analytic: float) -> float:
        """The error in units of the tolerance."""
        error = abs(analytic - self.expected)
        return math.inf if math.isnan(error) else error / max(self.tolerance, 5e-324)


class FiniteDifferences:
    """Differences of a subject's weighed outputs around the present values of its leaves."""

    def __init__(self, subject: Differentiable, weights: dict[str, Tensor], rtol: float, atol: float) -> None:
        self.rtol = rtol
        self._subject, self._weights, self._atol = subject, weights, atol
        self._base = {name: output.detach().clone() for name, output in subject.evaluate().items()}
        self._shapes = {name: base.shape for name, base in self._base.items()}
        self._infinite = {name for name, base in self._base.items() if base.isinf().any()}
        self._scale = {name: largest(base) for name, base in self._base.items()}
        self._weight_norms = {name: float(weight.norm()) for name, weight in weights.items()}

    def slopes(self, move: Move, step: float = STEP) -> dict[str, Slopes]:
        """The differences of every output at one step size."""
        distance = step * move.unit
        found = {}
        for name, (right, left) in self._changes(move, step).items():
            weight, size = self._weights[name], right.abs() + left.abs()
            moved = torch.where(size > 0, weight, 0.0)
            sums = torch.stack([(right + left).sum(), (right - left).abs().sum(), size.sum(), moved.norm()])
            total, gap, magnitude, weight_moved = (sums / distance).tolist()
            noise = ROUNDING * self._scale[name] * (weight_moved + self._weight_norms[name])
            found[name] = Slopes(distance, total / 2, (total - gap) / 2, (total + gap) / 2, magnitude, noise)
        return found

    def terms(self, move: Move, output: str) -> Tensor:
        """The terms of the central difference, one for each entry of the output."""
        right, left = self._changes(move, STEP)[output]
        return (right + left) / (2 * STEP * move.unit)

    def _changes(self, move: Move, step: float) -> dict[str, tuple[Tensor, Tensor]]:
        """The weighed changes of every output over a step, to the right and to the left."""
        # the first is worked out before the second move, since an output may share memory with what moves
        move.to(step)
        right = self._from_base()
        move.to(-step)
        left = self._from_base()
        move.to(0.0)
        return {name: (right[name], -left[name]) for name in self._base}

    def _from_base(self) -> dict[str, Tensor]:
        outputs = self._subject.evaluate()
        if {name: output.shape for name, output in outputs.items()} != self._shapes:
            raise EvaluationError("the outputs change their number or shapes as an entry moves by a small step")
        changes = {}
        for name, base in self._base.items():
            change = outputs[name].detach() - base
            if name in self._infinite:
                change = torch.where(outputs[name].detach() == base, 0.0, change)
            changes[name] = change * self._weights[name]
        return changes

    def first_look(self, analytic: float, slopes: Slopes, scale: float) -> tuple[Verdict, bool]:
        """The verdict of one step size, and whether the entry deserves a closer look.

        ``scale`` is the largest analytic value of the tensor.
        """
        tolerance = self._tolerance(analytic, slopes.central) + slopes.noise
        ok = math.isfinite(analytic) and abs(analytic - slopes.central) <= tolerance
        smooth = slopes.gap <= 1e-3 * slopes.size + 4 * slopes.noise
        sharp = slopes.noise <= max(1e-4 * scale, self._atol)
        return Verdict(ok, slopes.central, tolerance, settled=ok and smooth), not (ok and smooth and sharp)

    def ladder(self, move: Move) -> list[dict[str, Slopes]]:
        """The differences at every step size."""
        return [self.slopes(move, step) for step in LADDER]

    def closer_look(self, first: Verdict, analytic: float, rungs: list[Slopes], scale: float) -> Verdict:
        """The verdict of all step sizes."""
        rungs = list(itertools.takewhile(lambda rung: math.isfinite(rung.size), rungs))
        if not math.isfinite(analytic) or len(rungs) < 2:
            return Verdict(False, rungs[0].central if rungs else math.nan, 0.0)
        best, error = best_rung(rungs, UNSETTLED * scale + self._atol)
        tolerance = self._tolerance(analytic, best.central) + 10 * error
        resolution = UNSETTLED * max(abs(best.central), scale) + self._atol
        reliable = 10 * error <= resolution

        bottom, above = rungs[:2]
        slack = self._slack(bottom, bottom)
        steady = _is_steady(rungs)
        kink = steady and bottom.gap > max(2 * slack, 0.5 * above.gap)
        if kink or (steady and self._bounds(rungs) <= (10 * tolerance if reliable else resolution)):
            nearest = min(max(analytic, bottom.low), bottom.high)
            if self._is_between(analytic, rungs):
                return Verdict(True, nearest, slack, kink)
            if kink:
                return Verdict(False, nearest, slack, kink)
        if reliable:
            return Verdict(abs(analytic - best.central) <= tolerance, best.central, tolerance)
        # a jump or a kink near by spoils the large steps; the two smallest may lie on this side of it
        if slack <= resolution and abs(bottom.central - above.central) <= slack:
            return Verdict(abs(analytic - bottom.central) <= slack, bottom.central, slack)
        # nothing spoke against the first look but that it cannot tell small values apart
        return first if first.settled else Verdict(False, math.nan, 0.0, settled=False)

    def _slack(self, rung: Slopes, below: Slopes) -> float:
        """How far outside its one-sided slopes, seen from the next smaller step's, a value may lie."""
        bend = abs(rung.low - below.low) + abs(rung.high - below.high)
        return self._tolerance(rung.low, rung.high) + rung.noise + bend

    def _bounds(self, rungs: list[Slopes]) -> float:
        """How closely the one-sided slopes confine a value, at best."""
        lower = [rungs[0], *rungs]
        return min(rung.gap / 2 + self._slack(rung, below) for rung, below in zip(rungs[:4], lower, strict=False))

    def _is_between(self, analytic: float, rungs: list[Slopes]) -> bool:
        """Whether a value lies between the one-sided slopes at every step up to the usual one."""
        lower = [rungs[0], *rungs]
        return all(
            rung.low - self._slack(rung, below) <= analytic <= rung.high + self._slack(rung, below)
            for rung, below in zip(rungs[:4], lower, strict=False)
        )

    def _tolerance(self, *values: float) -> float:
        return self._atol + self.rtol * max(abs(value) for value in values)


def _is_steady(rungs: list[Slopes]) -> bool:
    """Whether the one-sided slopes draw no further apart as the step shrinks; at a jump, or in noise, they do."""
    return all(
        lower.gap <= 1.5 * upper.gap + lower.noise + 1e-12 * lower.size
        for lower, upper in itertools.pairwise(rungs[:5])
    )


def best_rung(rungs: list[Slopes], negligible: float) -> tuple[Slopes, float]:
    """The differences whose estimated error is least, and that error; infinite where no step will do.

    Steps at which the function bends, so that its one-sided slopes differ by more than half their mean and by more than
    is ``negligible``, are left out: beyond a kink near by, the central difference tends to the mean of its two sides.

    Where rounding rules, ``step * (change to the next rung)`` is the same everywhere: its largest value over the small
    steps is the rounding of v . y. Where truncation rules, the change grows 64 times from rung to rung, and the next
    rung is 64 times further off than this one; half of that factor is taken, for what higher orders add.
    """
    changes = [abs(upper.central - lower.central) for lower, upper in itertools.pairwise(rungs)]
    rounding = 0.0
    for rung, change, following in zip(rungs[:4], changes, [*changes[1:], 0.0], strict=False):
        if following < 8 * change:
            rounding = max(rounding, rung.step * change)
    errors = [rounding / rung.step + change / 32 for rung, change in zip(rungs, changes, strict=False)]
    straight = [
        (error, rung)
        for error, rung in zip(errors, rungs, strict=False)
        if rung.gap <= max(0.25 * rung.size, negligible) + 10 * error
    ]
    error, rung = min(straight, key=lambda pair: pair[0], default=(math.inf, rungs[0]))
    return rung, error
