"""The memory that the CPU kernels' results lie in, which stays with the process from step to step.

glibc hands big blocks back to the operating system as soon as they are free, and at the next training step every page
of them faults again, which takes longer than the arithmetic. The kernels take their memory from a pool instead. A
freed block waits there for the next request of its size, as long as used and waiting blocks together stay within a
limit; beyond it, and in :func:`empty_cache`, waiting blocks go back to the operating system.

The pool serves the kernels' results alone: importing nacre changes no memory but its own. :func:`keep_everywhere`
does the same for the whole process, torch's own operations included, and is yours to call.

A result of 64 KiB or more lies in the pool; such a tensor can be viewed, saved, shared and changed like any other, but
not enlarged in place (``resize_``): clone it first.

The pool may be used from many threads. A forked process has a copy of its own, as of all other memory.
"""

import ctypes
import sys
from dataclasses import dataclass

from nacre.core import native
from nacre.core.check import error

_MALLOC_TRIM_THRESHOLD, _MALLOC_MMAP_MAX = -1, -4
_LARGEST_INT = 2**31 - 1


@dataclass(frozen=True)
class Statistics:
    """What the pool holds, in bytes, and what it has done since the process began.

    Args:
        used: in tensors that live.
        cached: waiting to be used again.
        peak: the most that was used at once since :func:`reset_peak`.
        limit: how much used and cached blocks may be together before cached ones are given up.
        reused: requests served by a waiting block.
        mapped: requests for which the operating system was asked.
    """

    used: int = 0
    cached: int = 0
    peak: int = 0
    limit: int = 0
    reused: int = 0
    mapped: int = 0


def stats() -> Statistics:
    """What the pool holds and has done; zeros where the C++ kernels are not built, since nothing else uses it.

    Example:
        >>> import nacre
        >>> nacre.memory.stats().used >= 0
        True
    """
    library = native.library()
    if library is None:
        return Statistics()
    values = (ctypes.c_int64 * 6)()
    library.nacre_memory_statistics(values)
    return Statistics(*values)


def empty_cache() -> None:
    """Gives the waiting blocks back to the operating system; tensors that live keep theirs.

    Example:
        >>> import nacre
        >>> nacre.memory.empty_cache()
        >>> nacre.memory.stats().cached
        0
    """
    if library := native.library():
        library.nacre_memory_release()


def set_limit(bytes: int) -> None:
    """Bounds what used and waiting blocks may be together before waiting ones are given up.

    A request is served beyond the limit too: the limit bounds what waits, never what lives.

    Args:
        bytes: the bound; 0 keeps nothing. At first it is half of the machine's memory.

    Raises:
        ValueError: a negative number.

    Example:
        >>> import nacre
        >>> before = nacre.memory.stats().limit
        >>> nacre.memory.set_limit(2**30)
        >>> nacre.memory.set_limit(before)
    """
    if bytes < 0:
        raise error(ValueError, "the limit of the memory pool is a number of bytes", f"{bytes}")
    if library := native.library():
        library.nacre_memory_set_limit(ctypes.c_uint64(bytes))


def reset_peak() -> None:
    """Starts to look for the peak anew from what is used now.

    Example:
        >>> import nacre
        >>> nacre.memory.reset_peak()
        >>> nacre.memory.stats().peak == nacre.memory.stats().used
        True
    """
    if library := native.library():
        library.nacre_memory_reset_peak()


def keep_everywhere() -> bool:
    """Tells the C library to keep freed memory as well, for the whole process: torch's own operations fault less too.

    It asks glibc never to serve a request by a mapping of its own and never to trim the heap, for as long as the
    process lives, so the process's memory stays at its peak. The same as starting Python with
    ``MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647`` in the environment.

    Returns:
        Whether the C library took the settings: False where it is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    return all(
        libc.mallopt(option, value) == 1
        for option, value in ((_MALLOC_MMAP_MAX, 0), (_MALLOC_TRIM_THRESHOLD, _LARGEST_INT))
    )
