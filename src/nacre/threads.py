"""Threads that wait for each other, on cores which other processes want as well.

torch's CPU operations split their work over OpenMP's threads, and a thread that is done spins until the last one is. A
machine of one's own rewards that: sleeping and waking takes longer than most waits. In company it is a disaster: the
scheduler puts one of the threads aside for somebody else's process, and the others spin away the whole time slice, at
every operation. :func:`share` watches for that and lets the threads sleep while there is company, and only then.
"""

import ctypes
import os
import sys
import threading
from pathlib import Path

import torch

_PERIOD = 0.1  # seconds between two looks
_COMPANY, _ALONE = 0.15, 0.05  # of a period, the longest that a thread was ready to run and had no core
_TASKS = Path("/proc/self/task")


def share(on: bool = True) -> bool:
    """From now on, waiting threads sleep while other processes want the same cores, and spin while none does.

    It concerns the whole process, torch's own operations included, and changes no result. The same without watching,
    and for good, is ``OMP_WAIT_POLICY=passive`` in the environment before Python starts.

    How it works: ten times a second a thread reads from the kernel how long each thread of the process was ready to
    run without a core. In company it keeps some idle OpenMP threads, since GNU's OpenMP spins only a moment once a
    process has more threads than there are cores; alone it lets them go.

    Args:
        on: watch; otherwise stop watching and let threads spin as they did. Default: True.

    Returns:
        Whether the process is being watched: False where the system is not Linux or torch runs on another OpenMP than
        GNU's.

    Example:
        >>> import nacre
        >>> watched = nacre.threads.share()
        >>> nacre.threads.share(False)
        False
    """
    global _watch
    with _lock:
        if on and _watch is None and (openmp := _gnu_openmp()) is not None:
            _watch = _Watch(openmp)
        elif not on and _watch is not None:
            _watch.stop()
            _watch = None
        return _watch is not None


def sleeping() -> bool:
    """Whether waiting threads sleep at present, because :func:`share` has found company.

    Example:
        >>> import nacre
        >>> nacre.threads.sleeping()
        False
    """
    watch = _watch
    return watch is not None and watch.crowd is not None


class _Crowd:
    """OpenMP threads that do nothing: as many as make the process have more threads than there are cores."""

    def __init__(self, openmp: ctypes.CDLL) -> None:
        self._openmp = openmp
        self._made, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._live, name="nacre-crowd", daemon=True)
        self._thread.start()
        self._made.wait()

    def _live(self) -> None:
        try:
            threads = len(os.sched_getaffinity(0)) + 1
            values = torch.zeros(threads * 32768)  # torch gives a thread so many values at least
            torch.zeros(1).neg_()  # torch sets the number of threads at a thread's first operation
            self._openmp.omp_set_num_threads(threads)
            values.neg_()
        finally:
            self._made.set()
        self._over.wait()

    def leave(self) -> None:
        self._over.set()
        self._thread.join()


class _Watch:
    """The thread that looks for company."""

    def __init__(self, openmp: ctypes.CDLL) -> None:
        self.crowd: _Crowd | None = None
        self._openmp = openmp
        self._over = threading.Event()
        self._delays: dict[str, int] = {}
        self._thread = threading.Thread(target=self._look, name="nacre-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()
        if self.crowd is not None:
            self.crowd.leave()
            self.crowd = None

    def _look(self) -> None:
        self._longest_delay()
        while not self._over.wait(_PERIOD):
            delay = self._longest_delay()
            if self.crowd is None and delay > _COMPANY:
                self.crowd = _Crowd(self._openmp)
            elif self.crowd is not None and delay < _ALONE:
                self.crowd.leave()
                self.crowd = None

    def _longest_delay(self) -> float:
        """The largest share of the period that a thread was ready to run and had no core."""
        before, self._delays = self._delays, _delays()
        longest = max((delay - before.get(task, delay) for task, delay in self._delays.items()), default=0)
        return longest * 1e-9 / _PERIOD


def _delays() -> dict[str, int]:
    """Nanoseconds that each thread of this process has waited for a core so far."""
    found = {}
    for task in _TASKS.iterdir():
        try:
            found[task.name] = int((task / "schedstat").read_text().split()[1])
        except (OSError, IndexError):  # a thread that has just ended
            continue
    return found


def _gnu_openmp() -> ctypes.CDLL | None:
    """The OpenMP library that torch runs on, if it is GNU's and the kernel tells of delays."""
    if not sys.platform.startswith("linux") or not Path("/proc/self/schedstat").exists():
        return None
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split(maxsplit=5)[-1]
        if "libgomp" in Path(path).name:
            return ctypes.CDLL(path)
    return None


def _forget() -> None:
    global _watch, _lock
    _watch, _lock = None, threading.Lock()


_lock = threading.Lock()
_watch: _Watch | None = None
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)  # a fork has none of its parent's threads
