"""Where the C library lays a step's tensors: in the places of those that were let go.

glibc keeps freed blocks in order of their addresses, joins neighbours and gives out the smallest that is large enough.
A block beyond a bound comes from the system each time, and goes back to it. (The bound is that of a process which has
freed such a block once; before, it is smaller.) Free memory at the very end can go back too; that is left out, since
something that stays, such as a library's buffer, often lies behind it, and whether it does differs from run to run.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass, field

LARGEST_KEPT = 2**25
"""Bytes: a larger block comes from the system each time, and goes back to it."""

_UNIT = 64


@dataclass
class Heap:
    """Addresses from 0 on; each block remembers when it was touched."""

    _end: int = 0  # up to here there are blocks, free or not
    _sizes: list[tuple[int, int]] = field(default_factory=list)  # free blocks: bytes and address, in that order
    _starts: dict[int, tuple[int, int]] = field(default_factory=dict)  # of free blocks: their end, and when touched
    _ends: dict[int, int] = field(default_factory=dict)  # the start of a free block, by its end

    def take(self, size: int) -> tuple[int, int | None]:
        """A block: its address, and when it was touched last, None if never."""
        size = _rounded(size)
        place = bisect_left(self._sizes, (size, 0))
        if place == len(self._sizes):
            self._end += size
            return self._end - size, None
        start = self._sizes[place][1]
        end, touched = self._remove(start)
        if end > start + size:
            self._add(start + size, end, touched)
        return start, touched

    def give(self, start: int, size: int, touched: int) -> None:
        """A block comes back, which was touched at that time."""
        end = start + _rounded(size)
        if end in self._starts:
            end = self._remove(end)[0]
        if start in self._ends:
            start = self._ends[start]
            self._remove(start)
        self._add(start, end, touched)

    def _add(self, start: int, end: int, touched: int) -> None:
        self._starts[start], self._ends[end] = (end, touched), start
        insort(self._sizes, (end - start, start))

    def _remove(self, start: int) -> tuple[int, int]:
        end, touched = self._starts.pop(start)
        del self._ends[end]
        del self._sizes[bisect_left(self._sizes, (end - start, start))]
        return end, touched


def _rounded(size: int) -> int:
    return max(-(-size // _UNIT), 1) * _UNIT
