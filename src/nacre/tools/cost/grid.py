"""A table of measured times by sizes, and what lies between its points."""

import itertools
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

LONG = 0.2
"""Seconds: a point which takes longer, as far as its neighbours tell, is not measured but follows from them."""

Point = tuple[int, ...]
Measured = tuple[float, float]
"""Seconds of a call, and how much work it was: FLOPs of its products, or bytes where it has none."""


@dataclass(frozen=True)
class Grid:
    """Times of the calls of one kind.

    Args:
        axes: for each size of the kind the values that were measured, the smallest first.
        seconds: of the calls, the last axis running fastest.
        amounts: their work.
    """

    axes: tuple[tuple[int, ...], ...]
    seconds: tuple[float, ...]
    amounts: tuple[float, ...]

    def at(self, sizes: Sequence[int], amount: float) -> float:
        """The time of a call: that of the measured ones around it, straight on logarithmic scales, and in proportion
        beyond the largest; so much longer as it is more work than its sizes say.

        Args:
            sizes: one for each axis.
            amount: of its work.

        Example:
            >>> grid = Grid(((10, 1000),), (1.0, 100.0), (20.0, 2000.0))
            >>> [round(grid.at((size,), 2.0 * size), 6) for size in (10, 100, 2000)]
            [1.0, 10.0, 200.0]
            >>> round(grid.at((100,), 400.0), 6)
            20.0
        """
        seconds, usual = (math.exp(self._between(values, sizes)) for values in (self.seconds, self.amounts))
        beyond = math.prod(max(size / axis[-1], 1.0) for size, axis in zip(sizes, self.axes, strict=True))
        inside = all(size >= axis[0] for size, axis in zip(sizes, self.axes, strict=True))
        more = amount / (usual * beyond)
        return seconds * beyond * (more if inside else max(more, 1.0))

    def _between(self, values: Sequence[float], sizes: Sequence[int]) -> float:
        """The logarithm of the value at some sizes."""
        total = 0.0
        for corner in itertools.product(*(_shares(axis, size) for axis, size in zip(self.axes, sizes, strict=True))):
            weight, place = 1.0, 0
            for axis, (index, share) in zip(self.axes, corner, strict=True):
                weight, place = weight * share, place * len(axis) + index
            total += weight * math.log(values[place])
        return total

    def as_json(self) -> dict[str, Any]:
        """Plain values, for a file."""
        return {
            "axes": [list(axis) for axis in self.axes],
            "seconds": list(self.seconds),
            "amounts": list(self.amounts),
        }

    @staticmethod
    def from_json(values: Any) -> "Grid":
        """A grid from what ``as_json`` made of it.

        Raises:
            ValueError: it is none.
        """
        try:
            axes = tuple(tuple(int(size) for size in axis) for axis in values["axes"])
            seconds, amounts = (tuple(positive(one) for one in values[name]) for name in ("seconds", "amounts"))
        except (AttributeError, KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"this is no table of times: {error}") from error
        points = math.prod(len(axis) for axis in axes)
        if not points or len(seconds) != points or len(amounts) != points:
            raise ValueError("a table has a time for each of its points")
        if any(axis[0] < 1 or list(axis) != sorted(set(axis)) for axis in axes):
            raise ValueError("an axis has sizes that grow")
        return Grid(axes, seconds, amounts)


def positive(value: Any) -> float:
    """A number from outside, if it can be a time or a speed.

    Raises:
        ValueError: it cannot.
    """
    if not 0 < float(value) < math.inf:
        raise ValueError("times and speeds are greater than 0")
    return float(value)


def _shares(axis: Sequence[int], size: int) -> list[tuple[int, float]]:
    """The two points beside a size, or the one at the end of the axis, and how much each of them counts."""
    place = bisect_right(axis, size)
    if place == 0 or place == len(axis):
        return [(min(place, len(axis) - 1), 1.0)]
    share = math.log(size / axis[place - 1]) / math.log(axis[place] / axis[place - 1])
    return [(place - 1, 1.0 - share), (place, share)]


def measured(axes: Sequence[Sequence[int]], measure: Callable[[Point], dict[str, Measured]]) -> dict[str, Grid]:
    """Measures kinds together on one grid.

    Args:
        axes: its points, the smallest first.
        measure: gives each kind's time and work at a point.
    """
    points = list(itertools.product(*axes))
    found: dict[Point, dict[str, Measured]] = {}
    for point in sorted(points, key=math.prod):
        below = [(other, math.prod(point) / math.prod(other)) for other in _below(point, axes)]
        expected = [(sum(seconds for seconds, _ in found[other].values()) * ratio, other) for other, ratio in below]
        if expected and max(expected)[0] > LONG:
            near = max(expected)[1]
            ratio = math.prod(point) / math.prod(near)
            found[point] = {kind: (seconds * ratio, amount * ratio) for kind, (seconds, amount) in found[near].items()}
        else:
            found[point] = measure(point)
    kinds = set.intersection(*(set(one) for one in found.values()))
    grid_axes = tuple(tuple(axis) for axis in axes)
    return {
        kind: Grid(grid_axes, *(tuple(found[point][kind][which] for point in points) for which in (0, 1)))
        for kind in sorted(kinds)
    }


def _below(point: Point, axes: Sequence[Sequence[int]]) -> Iterator[Point]:
    """The neighbours of a point, one step down one axis."""
    for place, axis in enumerate(axes):
        index = list(axis).index(point[place])
        if index:
            yield (*point[:place], axis[index - 1], *point[place + 1 :])
