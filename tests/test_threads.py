"""Waiting threads sleep in company and spin alone. No test looks at how long anything takes."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import nacre
from nacre import threads

pytestmark = pytest.mark.skipif(threads._gnu_openmp() is None, reason="neither Linux nor GNU's OpenMP")


@pytest.fixture(autouse=True)
def nobody_watches():
    threads.share(False)  # a test of the command line may have begun to
    yield
    threads.share(False)


@pytest.fixture
def delay(monkeypatch):
    """What the kernel says that one thread waits for a core, as a share of the time, at the test's will."""
    share = {"company": 0.0}
    waited = {"1": 0.0}

    def delays():
        waited["1"] += share["company"] * threads._PERIOD * 1e9
        return {"1": int(waited["1"]), "2": 7}

    monkeypatch.setattr(threads, "_delays", delays)
    return share


def until(condition):
    for _ in range(200):
        if condition():
            return True
        time.sleep(0.05)
    return False


def test_threads_sleep_while_there_is_company(delay):
    before = threading.active_count()
    assert threads.share()
    assert not threads.sleeping()
    delay["company"] = 0.5
    assert until(threads.sleeping)
    tasks = len(list(Path("/proc/self/task").iterdir()))
    assert tasks > len(os.sched_getaffinity(0))
    delay["company"] = 0.0
    assert until(lambda: not threads.sleeping())
    assert until(lambda: len(list(Path("/proc/self/task").iterdir())) < tasks)
    assert not threads.share(False)
    assert threading.active_count() == before


def test_between_the_bounds_nothing_changes(delay):
    threads.share()
    delay["company"] = 0.1
    time.sleep(4 * threads._PERIOD)
    assert not threads.sleeping()
    delay["company"] = 0.5
    assert until(threads.sleeping)
    delay["company"] = 0.1
    time.sleep(4 * threads._PERIOD)
    assert threads.sleeping()


def test_watching_twice_is_watching_once(delay):
    before = threading.active_count()
    assert threads.share() and threads.share()
    assert threading.active_count() == before + 1
    assert not threads.share(False) and not threads.share(False)
    assert threading.active_count() == before


def test_results_and_the_number_of_threads_stay(delay):
    x = torch.randn(512, 768)
    torch.set_num_threads(2)
    expected = torch.nn.functional.layer_norm(x, (768,)), nacre.functional.layer_norm(x, (768,)), x @ x.t()
    threads.share()
    delay["company"] = 0.5
    assert until(threads.sleeping)
    assert torch.get_num_threads() == 2
    found = torch.nn.functional.layer_norm(x, (768,)), nacre.functional.layer_norm(x, (768,)), x @ x.t()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_the_kernel_tells_of_delays():
    first = threads._delays()
    assert str(os.getpid()) in first
    assert all(delay >= 0 for delay in first.values())


def test_a_fork_watches_anew():
    program = """
import os, nacre
assert nacre.threads.share()
child = os.fork()
if child == 0:
    forgotten = not nacre.threads.sleeping() and not nacre.threads.share(False)
    os._exit(0 if forgotten and nacre.threads.share() else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert not nacre.threads.share(False)
"""
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr


def test_importing_nacre_starts_no_thread():
    program = "import threading, nacre; print(threading.active_count())"
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert process.stdout.split() == ["1"], process.stderr
