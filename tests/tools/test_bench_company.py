"""nacre bench --company: the neighbour is there when it should be and never longer; both sides meet every setting."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from nacre.cli import main
from nacre.tools.bench import command, company, machine
from nacre.tools.bench.results import NACRE, TORCH


def state(process):
    """Of a process, in the letter of /proc; empty when there is none."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="reads Linux's /proc")


@needs_proc
@pytest.mark.parametrize("error", [None, KeyboardInterrupt, RuntimeError])
def test_the_neighbour_is_started_and_ended(error):
    process = None
    try:
        with company.neighbour() as process:
            assert state(process) in ("R", "S", "D")
            assert os.getsid(process) == process != os.getsid(0)
            if error is not None:
                raise error
    except (KeyboardInterrupt, RuntimeError) as caught:
        assert type(caught) is error
    assert state(process) == ""


@needs_proc
def test_the_neighbour_does_not_outlive_a_killed_parent():
    code = f"exec({company._NEIGHBOUR!r})"
    starter = (
        "import os, subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {code!r}, str(os.getpid())], start_new_session=True)\n"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", starter], stdout=subprocess.PIPE, text=True)
    orphan = int(parent.stdout.readline())
    try:
        assert state(orphan) not in ("", "Z")
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    end = time.monotonic() + 20
    while state(orphan) not in ("", "Z") and time.monotonic() < end:
        time.sleep(0.05)
    alive = state(orphan) not in ("", "Z")
    if alive:
        os.kill(orphan, signal.SIGKILL)
    assert not alive


@pytest.fixture
def counted_company(monkeypatch):
    """Company without measuring: times are counted up, and what each process was given is kept."""
    given, beside = [], []

    class Neighbour:
        def __enter__(self):
            beside.append(True)

        def __exit__(self, *error):
            beside.pop()

    def run_job(job, environment):
        given.append((job, environment, bool(beside)))
        yield {"seconds": 3.0 if beside else 2.0}

    monkeypatch.setattr(company, "neighbour", Neighbour)
    monkeypatch.setattr(company, "run_job", run_job)
    monkeypatch.setenv("OMP_DYNAMIC", "true")
    return given


def test_company_compares_both_sides_under_every_setting(counted_company):
    settings = (company.Setting("plain"), company.Setting("other", {"OMP_WAIT_POLICY": "passive"}))
    rows = company.company(1.0, threads=2, settings=settings)
    assert len(rows) == len(company.WORKLOADS) * 2 * 2
    assert [(one.setting, one.side) for one in rows[:4]] == list(itertools.product(("plain", "other"), (TORCH, NACRE)))
    assert all(one.slowdown == 1.5 and one.as_json()["slowdown"] == 1.5 for one in rows)
    assert [beside for _, _, beside in counted_company] == [False, True] * len(rows)
    for one, (_, environment, _) in zip(rows, counted_company[::2], strict=True):
        assert environment.get("OMP_WAIT_POLICY") == ("passive" if one.setting == "other" else None)
        assert "OMP_DYNAMIC" not in environment
        assert environment["OMP_NUM_THREADS"] == "2"


def test_the_company_command_prints_and_writes(counted_company, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "describe_machine", lambda settings: (machine.describe(), machine.warnings(1.5)))
    assert main(["bench", "--company", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "OMP_WAIT_POLICY=passive" in printed and "other processes keep 1.5 cores busy" in printed
    found = json.loads((tmp_path / "company.json").read_text())
    assert len(found["rows"]) == len(company.WORKLOADS) * len(company.SETTINGS) * 2
    assert "| nacre | 2000 ms | 3000 ms | 1.5 |" in (tmp_path / "company.md").read_text()


@pytest.mark.parametrize("side", [TORCH, NACRE])
def test_company_steps_train(side):
    assert all(company.seconds_of(workload, side, 0.0) > 0 for workload in company.WORKLOADS)
