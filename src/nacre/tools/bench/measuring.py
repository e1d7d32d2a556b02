"""Times several sides of a comparison against each other, round by round."""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from nacre.tools.bench.results import Side

LEAST_SAMPLE = 5e-3
"""Seconds: a shorter sample would measure the clock and the scheduler more than the step."""

LEAST_ROUNDS = 3
"""So many are needed for a median that one disturbed round does not move."""


def page_faults() -> int:
    """Minor page faults of this process so far; 0 where the system does not count them."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def measure(
    steps: Mapping[str, Callable[[], object]],
    rounds: int,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
    faults: Callable[[], int] = page_faults,
) -> dict[str, Side]:
    """The median time and page faults of each step, all of them measured in every round, in an order drawn anew.

    What runs before a step changes what it finds in the caches, and a fixed cycle of sides would put the same one
    behind the copy each time.

    Args:
        steps: what to time, by name; a short step is repeated within a sample.
        rounds: at most so many.
        seconds: after which no further round begins, once there were three.
        clock: seconds that pass.
        faults: page faults so far.
    """
    if not steps:
        return {}
    with _without_garbage_collection():
        repeats = {name: _repeats(step, clock) for name, step in steps.items()}
        samples: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
        names, shuffled = list(steps), random.Random(0)
        start = clock()
        for number in range(rounds):
            if number >= LEAST_ROUNDS and clock() - start > seconds:
                break
            shuffled.shuffle(names)
            for name in names:
                samples[name].append(_sample(steps[name], repeats[name], clock, faults))
    return {
        name: Side(
            seconds=statistics.median(taken for taken, _ in found),
            page_faults=statistics.median(faulted for _, faulted in found),
            rounds=len(found),
        )
        for name, found in samples.items()
    }


def _sample(
    step: Callable[[], object], repeats: int, clock: Callable[[], float], faults: Callable[[], int]
) -> tuple[float, float]:
    if repeats > 1:
        step()  # finds the caches as another side left them, which is no part of the time of 200 steps of 25 us
    faults_before, start = faults(), clock()
    for _ in range(repeats):
        step()
    taken, faulted = clock() - start, faults() - faults_before
    return taken / repeats, faulted / repeats


def _repeats(step: Callable[[], object], clock: Callable[[], float]) -> int:
    """How often a step is repeated within a sample; finding it out warms the step up."""
    step()
    repeats = 1
    for _ in range(2):  # the first estimate is of a step that was still cold
        taken, _ = _sample(step, repeats, clock, lambda: 0)
        repeats = max(1, math.ceil(LEAST_SAMPLE / max(taken, 1e-7)))
    return repeats


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
