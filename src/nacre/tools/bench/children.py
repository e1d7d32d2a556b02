"""Fresh child processes: the allocator and the threads are set in their environment before torch loads."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "2147483647", "MALLOC_TOP_PAD_": "67108864"}
"""Has glibc keep freed memory for everybody, torch's own operations too."""

ALLOCATORS: dict[str, Mapping[str, str]] = {"default": {}, "kept": KEPT}

_OTHERS = ("MALLOC_", "GLIBC_TUNABLES")  # what would make "default" something else


def environment(
    allocator: str = "default", threads: int | None = None, without: tuple[str, ...] = ()
) -> dict[str, str]:
    """The environment of a child: this process's, with the allocator's variables and the threads.

    Args:
        allocator: a key of ``ALLOCATORS``.
        threads: of torch. Default: what torch finds.
        without: beginnings of the names of variables that are left out.
    """
    found = {name: value for name, value in os.environ.items() if not name.startswith(_OTHERS + without)}
    if threads is not None:
        found |= {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    # the compiler's worker processes would be company to what is timed
    return found | {"TORCHINDUCTOR_COMPILE_THREADS": "1"} | dict(ALLOCATORS[allocator])


def run_job(job: Mapping[str, Any], environment: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """What a child process finds, as it finds it.

    Args:
        job: its name under ``"job"``, and what :mod:`nacre.tools.bench.worker` reads for it.
        environment: of the child.

    Raises:
        ChildProcessError: the child died.
    """
    command = [sys.executable, "-m", "nacre.tools.bench.worker"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=dict(environment), text=True
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        try:
            with child.stdin as given:
                json.dump(job, given)
            for line in child.stdout:
                yield json.loads(line)
            if child.wait() != 0:
                raise ChildProcessError(f"the process that measures {job['job']} ended with status {child.returncode}.")
        finally:
            child.kill()  # where an error or Ctrl-C ends this process's wait
