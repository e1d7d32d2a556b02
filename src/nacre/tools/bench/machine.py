"""What the times were taken on, and whether the machine was quiet."""

import os
import platform
import time
from pathlib import Path

import torch

import nacre
from nacre.core import native
from nacre.tools.bench.results import Machine

QUIET = 0.2
"""Cores: with more than so much work by other processes, times are not to be trusted."""

CHANGING = ("ATEN_", "GOMP_", "KMP_", "LD_PRELOAD", "MKL_", "OMP_", "ONEDNN_")
"""How the names of environment variables begin which change how fast torch computes, the allocator's apart."""


def describe() -> Machine:
    """This machine, with torch's present number of threads."""
    return Machine(
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        instructions=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
        kernels=f"not built ({native.unavailable()})" if native.unavailable() else "compiled",
        versions={
            "torch": torch.__version__,
            "nacre": nacre.__version__,
            "Python": platform.python_version(),
            platform.system(): platform.release(),
        },
        environment={name: value for name, value in sorted(os.environ.items()) if name.startswith(CHANGING)},
    )


def other_load(seconds: float = 0.5) -> float | None:
    """How many cores other processes keep busy, watched for so long; None where the system does not tell."""
    before = _busy_seconds()
    time.sleep(seconds)
    after = _busy_seconds()
    return None if before is None or after is None else max(after - before, 0.0) / seconds


def warnings(load: float | None) -> list[str]:
    """What the load by other processes means for the times.

    Example:
        >>> warnings(0.1)
        []
        >>> warnings(1.5)
        ['the machine is not quiet: other processes keep 1.5 cores busy, so the times are not to be trusted']
    """
    if load is None:
        return ["this system does not tell how busy other processes are"]
    if load > QUIET:
        return [
            f"the machine is not quiet: other processes keep {load:.1f} cores busy, so the times are not to be trusted"
        ]
    return []


def _busy_seconds() -> float | None:
    """Seconds that all cores together have worked for others since the machine started."""
    try:
        first = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0]
        user, nice, system, _, _, interrupts, soft_interrupts, stolen = map(int, first.split()[1:9])
    except (OSError, ValueError):
        return None
    working = user + nice + system + interrupts + soft_interrupts + stolen
    own = os.times()
    return working / os.sysconf("SC_CLK_TCK") - own.user - own.system


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
