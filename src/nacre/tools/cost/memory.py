"""The memory of a run, followed from one operator to the next."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch

from nacre.tools.cost.distances import Done, Event, Freed, Taken
from nacre.tools.cost.operators import Work


class Memory:
    """How many bytes live, and how many at most.

    A storage lives from the operator that makes it until nothing refers to it; what an operator takes and gives back
    within itself is not seen.
    """

    def __init__(self) -> None:
        self.live = 0
        self.peak = 0
        self.peak_in = ""
        self.log: list[Event] = []
        self._storages: dict[int, tuple[int, Any, int]] = {}
        self._met = 0
        self._kept: dict[int, list[Any]] = {}
        self._own: set[int] = set()

    def owns(self, tensors: Iterable[torch.Tensor]) -> None:
        """Parameters and buffers: they are there all the time, and keeping them for the backward costs nothing."""
        for tensor in tensors:
            self._own.add(self.sees(tensor, "the model"))

    def sees(self, tensor: torch.Tensor, where: str, own: bool = False) -> int:
        """Follows the storage of a tensor from now on; returns the storage's key.

        Args:
            tensor: any.
            where: the name of the call in which it was met.
            own: whether an operator of nacre made it.
        """
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # sparse tensors have none
            return 0
        key = storage._cdata
        if key not in self._storages:
            size = storage.nbytes()
            self._met += 1
            self._storages[key] = (size, weakref.ref(storage, lambda _: self._dies(key)), self._met)
            self.log.append(Taken(self._met, size, own))
            self.live += size
            if self.live > self.peak:
                self.peak, self.peak_in = self.live, where
        return key

    def runs(self, place: int, work: Work, touched: list[tuple[torch.Tensor, int]]) -> None:
        """An operator has run, the one with that number in the order of all of them."""
        sizes: dict[int, int] = {}
        for tensor, size in touched:
            key = self.sees(tensor, "")
            if key:
                number = self._storages[key][2]
                sizes[number] = max(sizes.get(number, 0), size)
        self.log.append(Done(place, work, tuple(sizes.items())))

    def keeps(self, tensor: torch.Tensor, row: Any) -> "Kept":
        """Autograd keeps a tensor, as long as it keeps what this returns."""
        key = self.sees(tensor, row.name)
        if key and key not in self._own:
            self._kept.setdefault(key, []).append(row)
        return Kept(tensor, lambda: self._releases(key, row))

    def settle(self) -> None:
        """The forward is over: the call that first kept a storage pays for it."""
        for key, rows in self._kept.items():
            rows[0].saved_bytes += self._storages[key][0]
        self._kept = {}

    def _releases(self, key: int, row: Any) -> None:
        rows = self._kept.get(key, [])
        if row in rows:
            rows.remove(row)  # no backward will come for it
            if not rows:
                del self._kept[key]

    def _dies(self, key: int) -> None:
        size, _, number = self._storages.pop(key)
        self.live -= size
        self.log.append(Freed(number))


class Kept:
    """A tensor in autograd's hands, which says when it is let go."""

    def __init__(self, tensor: torch.Tensor, released: Callable[[], None]) -> None:
        self.tensor = tensor
        self._released = released

    def __del__(self) -> None:
        self._released()
