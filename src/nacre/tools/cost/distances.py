"""How far the tensors of a step have gone from the processor when an operator touches them, and which memory is new.

The log of a run is played twice, since a step meets the memory that the step before has left:

- a tensor's *distance* is the number of bytes touched since it was touched last; what fits into a cache of that size is
  still there;
- the C library keeps freed blocks and gives out the latest one first, at the distance at which that was left. It hands
  memory back to the system where a block was larger than it ever keeps, or where twice as much lies free; whatever is
  taken after that is *fresh*: its pages have to be found again, and cleared. (glibc's bounds are those of a process that
  has freed such a block once; before, they are smaller.) Results of nacre's operators lie in a pool that keeps them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from nacre.tools.cost.operators import Work

LARGEST_KEPT = 2**25
"""Bytes: glibc maps a larger block anew each time, and gives it back when it is free."""

MOST_FREE = 2 * LARGEST_KEPT
"""Bytes: with more than that free, it gives all of them back."""


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


Event = Taken | Freed | Done


def with_distances(log: Sequence[Event]) -> dict[int, Work]:
    """The work of each operator in the log by its place, with distances and fresh bytes, as a later step meets them.

    Args:
        log: what happened in one step; tensors whose memory is not taken in it live before and after.
    """
    play = _Play()
    play.step(log)
    return play.step(log)


@dataclass
class _Pool:
    """Free blocks, the latest last: their bytes, and when they were touched."""

    keeps: bool
    free: list[tuple[int, int]] = field(default_factory=list)
    total: int = 0

    def give(self, size: int, touched: int) -> None:
        if not self.keeps and size > LARGEST_KEPT:
            return
        self.free.append((size, touched))
        self.total += size
        if not self.keeps and self.total > MOST_FREE:
            self.free.clear()
            self.total = 0

    def take(self, size: int) -> tuple[int, int | None]:
        """How many bytes are fresh, and when most of the others were touched."""
        if not self.keeps and size > LARGEST_KEPT:
            return size, None
        left, oldest = size, None
        while left and self.free:
            block, touched = self.free.pop()
            self.total -= block
            oldest = touched if oldest is None else min(oldest, touched)
            if block > left:
                self.free.append((block - left, touched))
                self.total += block - left
                block = left
            left -= block
        return left, oldest


@dataclass
class _Play:
    clock: int = 0
    last: dict[int, int | None] = field(default_factory=dict)
    sizes: dict[int, tuple[int, bool]] = field(default_factory=dict)
    pools: dict[bool, _Pool] = field(default_factory=lambda: {own: _Pool(keeps=own) for own in (False, True)})

    def step(self, log: Sequence[Event]) -> dict[int, Work]:
        done: dict[int, Work] = {}
        fresh = 0
        for event in log:
            if isinstance(event, Taken):
                new, self.last[event.tensor] = self.pools[event.own].take(event.size)
                self.sizes[event.tensor] = (event.size, event.own)
                fresh += new
            elif isinstance(event, Freed):
                self._free(event.tensor)
            else:
                done[event.place] = replace(event.work, distances=self._touch(event), fresh=fresh)
                fresh = 0
        for tensor in list(self.sizes):  # gradients, before the next step
            self._free(tensor)
        return done

    def _free(self, tensor: int) -> None:
        if tensor in self.sizes:
            size, own = self.sizes.pop(tensor)
            self.pools[own].give(size, self.last.pop(tensor) or self.clock)

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
