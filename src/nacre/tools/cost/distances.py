"""How far the tensors of a step have gone from the processor when an operator touches them, and which memory is new.

The log of a run is played several times, since a step meets the memory that the step before has left:

- a tensor's *distance* is the number of bytes touched since it was touched last; what fits into a cache of that size is
  still there;
- a result lies where an earlier tensor was let go (:mod:`.heap`), at the distance at which that was left, or in memory
  that is *fresh*: the system has to find its pages and to clear them. Results of nacre's operators lie in a pool that
  keeps its memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from nacre.tools.cost.heap import LARGEST_KEPT, Heap
from nacre.tools.cost.operators import Work


@dataclass(frozen=True)
class Taken:
    """A tensor's memory begins to live."""

    tensor: int
    size: int
    own: bool


@dataclass(frozen=True)
class Freed:
    """A tensor's memory is given back."""

    tensor: int


@dataclass(frozen=True)
class Done:
    """An operator has run.

    Args:
        place: its number in the log of operators.
        work: what it did.
        touched: each tensor which it read or wrote, with the bytes.
    """

    place: int
    work: Work
    touched: tuple[tuple[int, int], ...]


_STEPS = 2
"""Before the one which counts: until then blocks have found their places."""

Event = Taken | Freed | Done


def with_distances(log: Sequence[Event]) -> dict[int, Work]:
    """The work of each operator in the log by its place, with distances and fresh bytes, as a later step meets them.

    Args:
        log: what happened in one step; tensors whose memory is not taken in it live before and after.
    """
    play = _Play()
    for _ in range(_STEPS):
        for _ in play.step(log):
            pass
    return {event.place: replace(event.work, distances=far, fresh=fresh) for event, far, fresh in play.step(log)}


@dataclass
class _Play:
    clock: int = 0
    last: dict[int, int] = field(default_factory=dict)
    blocks: dict[int, tuple[Heap, int, int]] = field(default_factory=dict)
    heap: Heap = field(default_factory=Heap)
    pool: Heap = field(default_factory=Heap)

    def step(self, log: Sequence[Event]) -> Iterator[tuple[Done, tuple[tuple[int, int], ...], int]]:
        """The operators, each with the distances of what it touches and its fresh bytes."""
        fresh = 0
        for event in log:
            if isinstance(event, Taken):
                fresh += self._take(event)
            elif isinstance(event, Freed):
                self._free(event.tensor)
            else:
                yield event, self._touch(event), fresh
                fresh = 0
        for tensor in list(self.blocks):  # gradients, before the next step
            self._free(tensor)

    def _take(self, event: Taken) -> int:
        """How many bytes of it are fresh."""
        if event.size > LARGEST_KEPT and not event.own:
            self.last.pop(event.tensor, None)
            return event.size
        heap = self.pool if event.own else self.heap
        start, touched = heap.take(event.size)
        self.blocks[event.tensor] = (heap, start, event.size)
        if touched is not None:
            self.last[event.tensor] = touched
        return 0

    def _free(self, tensor: int) -> None:
        if tensor in self.blocks:
            heap, start, size = self.blocks.pop(tensor)
            heap.give(start, size, self.last.pop(tensor, self.clock))

    def _touch(self, event: Done) -> tuple[tuple[int, int], ...]:
        """The bytes of an operator by their distance; all of them are near once it has run."""
        found: dict[int, int] = {}
        for tensor, size in event.touched:
            before = self.last.get(tensor)
            if before is not None:
                distance = 1 << (self.clock - before).bit_length()
                found[distance] = found.get(distance, 0) + size
        self.clock += sum(size for _, size in event.touched)
        for tensor, _ in event.touched:
            self.last[tensor] = self.clock
        return tuple(sorted(found.items()))
