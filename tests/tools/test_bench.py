"""nacre bench: right results before times, times by the rules, reports of both. No test judges how long a step took."""

import dataclasses
import importlib
import json
import mmap
import subprocess
import sys
import time

import pytest
import torch

import nacre
from nacre.blocks import BLOCKS
from nacre.cli import main
from nacre.layers import LAYERS
from nacre.tools.bench import children, comparing, machine, measuring, run, worker
from nacre.tools.bench.results import COMPILED, COPY, NACRE, TORCH, Ceilings, Row, Side
from nacre.tools.bench.run import bench
from nacre.tools.bench.selection import Settings, selected

SPECS = {**LAYERS, **BLOCKS}
QUICK = Settings(rounds=1, seconds=0.01, compile=False, matrix_size=16, copied_bytes=1024)


def case_of(name):
    ((spec, case),) = selected([name])
    return spec, case


def row(seconds=None, limit=1.0, allocator="default", **sides):
    sides = sides or {name: Side(seconds=value, page_faults=0.0, rounds=3) for name, value in (seconds or {}).items()}
    return Row("layer_norm", "text", "LayerNorm(8)", "4x8", allocator, "C++ kernel", 10, 20, 10.0, limit, sides)


# ---- arithmetic


def test_the_limit_is_the_longer_of_products_and_traffic():
    ceilings = Ceilings(matrix_flops=100.0, copy_bytes=10.0)
    assert ceilings.seconds(flops=300, bytes=10) == 3.0
    assert ceilings.seconds(flops=300, bytes=50) == 5.0


def test_ratios_and_shares():
    timed = row({TORCH: 4.0, COMPILED: 3.0, NACRE: 2.0}, limit=1.0)
    assert timed.ratio == 2.0
    assert timed.best_ratio == 1.5
    assert [timed.share(side) for side in (TORCH, COMPILED, NACRE)] == [0.25, 1 / 3, 0.5]
    found = timed.as_json()
    assert (found["ratio"], found["best_ratio"], found["share_of_limit"][NACRE]) == (2.0, 1.5, 0.5)
    assert Row.from_json(dataclasses.asdict(timed)) == timed


def test_a_higher_peak_is_that_of_all_rows():
    report = nacre.tools.bench.BenchReport(
        machine.describe(), "float32", Ceilings(matrix_flops=5.0, copy_bytes=99.0), [row({NACRE: 4.0}, limit=2.0)]
    )
    report.raise_peak(4.0)
    assert (report.ceilings.matrix_flops, report.rows[0].limit) == (5.0, 2.0)
    report.raise_peak(8.0)  # 10 FLOPs take 1.25 s then, 20 bytes at the row's 10 a second 2 s
    assert (report.ceilings.matrix_flops, report.rows[0].limit) == (8.0, 2.0)
    report.rows[0] = dataclasses.replace(report.rows[0], copy_bytes=20.0)
    report.raise_peak(16.0)
    assert report.ceilings == Ceilings(matrix_flops=16.0, copy_bytes=99.0)
    assert (report.rows[0].limit, report.rows[0].share(NACRE)) == (1.0, 0.25)


def test_the_peak_is_measured_after_the_cases_as_well(monkeypatch):
    run = importlib.import_module("nacre.tools.bench.run")
    peaks = iter([5.0, 4.0, 8.0])  # before, and after each of two allocators
    monkeypatch.setattr(run, "measured_ceilings", lambda settings: Ceilings(next(peaks), copy_bytes=9.0))
    monkeypatch.setattr(run, "describe_machine", lambda settings: (machine.describe(), []))
    monkeypatch.setattr(run, "run_job", lambda job, variables: iter(()))
    assert bench(["layer_norm/rows"]).ceilings == Ceilings(matrix_flops=8.0, copy_bytes=9.0)


def test_what_was_not_timed_has_no_ratio():
    refused = row(
        **{TORCH: Side(seconds=4.0), COMPILED: Side(problem="cannot"), NACRE: Side(problem="off", wrong=True)}
    )
    assert refused.wrong
    assert (refused.ratio, refused.best_ratio, refused.share(NACRE), refused.share(TORCH)) == (None, None, None, 0.25)
    uncompiled = row(**{TORCH: Side(seconds=4.0), COMPILED: Side(problem="cannot"), NACRE: Side(seconds=2.0)})
    assert not uncompiled.wrong
    assert uncompiled.best_ratio == 2.0


def test_the_summary_is_over_the_cases_of_both_sides():
    where = machine.describe()
    rows = [row({TORCH: 2.0, NACRE: 2.0}), row({TORCH: 8.0, NACRE: 2.0}), row({TORCH: 100.0})]
    report = nacre.tools.bench.BenchReport(where, "float32", Ceilings(1.0, 1.0), rows)
    assert "2 cases" in report.summary("default")
    assert "2.00 times" in report.summary("default")
    assert "torch.nn reaches 25% of the limit, nacre 50%" in report.summary("default")
    assert "no case" in report.summary("kept")


# ---- measuring


class Steps:
    """Steps of known length on a clock of their own, and the order they were called in."""

    def __init__(self, **seconds):
        self.now, self.calls, self.faults = 0.0, [], 0
        self.steps = {name: lambda name=name, taken=taken: self.step(name, taken) for name, taken in seconds.items()}

    def step(self, name, seconds):
        self.now += seconds
        self.faults += 7
        self.calls.append(name)

    def measure(self, rounds, seconds):
        return measuring.measure(self.steps, rounds, seconds, clock=lambda: self.now, faults=lambda: self.faults)


def test_every_side_comes_first_and_follows_every_other():
    steps = Steps(a=0.5, b=0.25, c=1.0)
    found = steps.measure(rounds=10, seconds=100)
    rounds = ["".join(steps.calls[at : at + 3]) for at in range(len(steps.calls) - 30, len(steps.calls), 3)]
    assert {"".join(sorted(names)) for names in rounds} == {"abc"}
    assert {names[0] for names in rounds} == set("abc")
    assert {pair for names in rounds for pair in (names[:2], names[1:])} == {"ab", "ac", "ba", "bc", "ca", "cb"}
    assert {name: side.seconds for name, side in found.items()} == {"a": 0.5, "b": 0.25, "c": 1.0}
    assert {(side.page_faults, side.rounds) for side in found.values()} == {(7, 10)}


def test_the_first_of_repeated_steps_is_not_counted():
    steps = Steps(after_a_pause=2**-10, long=1.0)
    usual, warm_up = steps.steps["after_a_pause"], []

    def slow_at_first():
        usual()
        if steps.calls[-2:-1] in ([], ["long"]):  # the caches hold what the other side left
            steps.now += 0.5
            warm_up.append(True)

    steps.steps["after_a_pause"] = slow_at_first
    assert steps.measure(rounds=3, seconds=100)["after_a_pause"].seconds == 2**-10
    assert warm_up


def test_short_steps_are_repeated_within_a_sample():
    steps = Steps(short=2**-10, long=1.0)
    found = steps.measure(rounds=1, seconds=100)
    assert sorted(steps.calls[-8:]) == ["long"] + ["short"] * 7  # the first of them is not counted
    assert found["short"].seconds == 2**-10
    assert found["short"].page_faults == 7


def test_rounds_end_when_the_time_is_up_but_not_before_three():
    assert Steps(a=1.0).measure(rounds=10, seconds=0.5)["a"].rounds == measuring.LEAST_ROUNDS
    assert Steps(a=1.0).measure(rounds=10, seconds=5.0)["a"].rounds == 6
    assert Steps(a=1.0).measure(rounds=2, seconds=5.0)["a"].rounds == 2
    assert measuring.measure({}, rounds=3, seconds=1.0) == {}


def test_page_faults_are_counted():
    pages = 500

    def touch():
        with mmap.mmap(-1, pages * mmap.PAGESIZE) as memory:
            memory.madvise(mmap.MADV_NOHUGEPAGE)
            for page in range(pages):
                memory[page * mmap.PAGESIZE] = 1

    found = measuring.measure({"touch": touch, "rest": lambda: time.sleep(0.005)}, rounds=3, seconds=1.0)
    assert pages <= found["touch"].page_faults < 2 * pages
    assert found["rest"].page_faults < 10


# ---- results are checked before they are timed


@pytest.mark.parametrize(
    "name",
    [
        "layer_norm/rows",
        "gelu/rows",
        "linear/small",
        "attention/padding",
        "attention/dropout without weights",
        "lstm/packed",
        "embedding/sparse",
        "cross_entropy/weights",
        "dropout/most dropped",
        "dropout/inplace",
        "residual_block/rows",
        "transformer_block/dropout",
        "transformer_encoder_layer/relu",
    ],
)
def test_right_results_pass(name):
    spec, case = case_of(name)
    assert comparing.check_case(spec, case, QUICK)[0] == {}


class ForgottenBias(nacre.LayerNorm):
    def forward(self, input):
        return super().forward(input) - self.bias


class WrongGradient(nacre.LayerNorm):
    def forward(self, input):
        return Scaled.apply(super().forward(input))


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        return 1.001 * gradient


class Unscaled(nacre.Dropout):
    def forward(self, input):
        return super().forward(input) * (1 - self.p)


class OtherMask(nacre.Dropout):
    def forward(self, input):
        return super().forward(input).detach() + 0 * input + super().forward(input - input.detach())


class Broken(nacre.LayerNorm):
    def forward(self, input):
        raise RuntimeError("this kernel is broken\nwith a long story")


class UnscaledAttention(nacre.MultiheadAttention):
    def forward(self, *inputs, **keywords):
        output, weights = super().forward(*inputs, **keywords)
        return torch.nn.functional.dropout(output, 0.1) * 0.9, weights


def planted(layer, name):
    spec, case = case_of(name)
    return dataclasses.replace(spec, layer=layer), case


@pytest.mark.parametrize(
    ("layer", "name", "problem"),
    [
        (ForgottenBias, "layer_norm/rows", "output is"),
        (WrongGradient, "layer_norm/rows", "gradient of input 0 is"),
        (Broken, "layer_norm/rows", "RuntimeError: this kernel is broken"),
        (Unscaled, "dropout/small", "output is not 1.111 times"),
        (OtherMask, "dropout/small", "gradient of input 0 is not"),
        (UnscaledAttention, "attention/dropout without weights", "away from float64"),
    ],
)
def test_wrong_results_are_refused(layer, name, problem):
    spec, case = planted(layer, name)
    refused, _ = comparing.check_case(spec, case, QUICK)
    assert list(refused) == [NACRE]
    assert refused[NACRE].wrong and refused[NACRE].seconds is None
    assert problem in refused[NACRE].problem and "\n" not in refused[NACRE].problem
    assert NACRE not in comparing.time_case(spec, case, QUICK, refused)


def test_a_compiler_that_cannot_is_reported_and_no_wrong_result(monkeypatch):
    def cannot(module):
        raise torch._dynamo.exc.Unsupported("it cannot")

    monkeypatch.setattr(comparing, "compiled", cannot)
    spec, case = case_of("layer_norm/rows")
    refused, _ = comparing.check_case(spec, case, dataclasses.replace(QUICK, compile=True))
    assert list(refused) == [COMPILED]
    assert "it cannot" in refused[COMPILED].problem
    assert not refused[COMPILED].wrong


def test_a_case_is_checked_once_for_all_allocators(monkeypatch):
    monkeypatch.setattr(comparing, "apart", lambda function, *arguments: function(*arguments))
    checks = []
    monkeypatch.setattr(comparing, "check_case", lambda *arguments: checks.append(arguments) or ({}, "formula"))
    spec, case = case_of("layer_norm/rows")
    first = comparing.measured(spec, case, QUICK, "default", Ceilings(1.0, 1.0))
    first = dataclasses.replace(first, sides={**first.sides, NACRE: Side(problem="off", wrong=True)})
    second = comparing.measured(spec, case, QUICK, "kept", Ceilings(1.0, 1.0), first)
    assert len(checks) == 1
    assert second.allocator == "kept" and second.implementation == "formula"
    assert second.sides[NACRE] == first.sides[NACRE] and second.sides[TORCH].seconds > 0


def test_a_process_that_dies_is_a_wrong_result(monkeypatch):
    def apart(function, *arguments):
        if function is comparing.check_case:
            raise ChildProcessError("the process ended with status 3")
        return function(*arguments)

    monkeypatch.setattr(comparing, "apart", apart)
    spec, case = case_of("layer_norm/rows")
    found = comparing.measured(spec, case, QUICK, "default", Ceilings(1.0, 1.0))
    assert found.wrong and "status 3" in found.sides[NACRE].problem


def test_functions_run_apart():
    # in a process of its own: forking one that has run threads, as this may have, is not what a worker does
    code = (
        "import os; from nacre.tools.bench.comparing import apart\n"
        "print(apart(os.getpid) != os.getpid(), apart(abs, -3))\n"
        "try: apart(os._exit, 3)\n"
        "except ChildProcessError as error: print(error)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split("\n")[:2] == ["True 3", "the process ended with status 3"]


def test_a_layer_that_torch_does_not_have_is_judged_by_its_own_float64():
    class Own(nacre.LayerNorm):
        pass

    spec, case = planted(Own, "layer_norm/rows")
    spec = dataclasses.replace(spec, replaces=None)
    assert comparing.check_case(spec, case, QUICK)[0] == {}
    assert list(comparing.time_case(spec, case, QUICK, ())) == [NACRE, COPY]


# ---- the command


@pytest.fixture
def in_this_process(monkeypatch):
    """The jobs of the child processes done here, so that a planted kernel reaches them."""

    def run_job(job, environment):
        yield from worker.jobs(json.loads(json.dumps(job)))

    monkeypatch.setattr(run, "run_job", run_job)
    monkeypatch.setattr(run, "other_load", lambda: 1.5)
    monkeypatch.setattr(comparing, "apart", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(worker, "measure_ceilings", lambda settings: Ceilings(1e11, 1e10))


ARGUMENTS = ["--no-compile", "--rounds", "1", "--seconds", "0.01"]


def test_the_command_prints_and_writes(in_this_process, tmp_path, capsys):
    folder = tmp_path / "new" / "results"
    assert main(["bench", "layer_norm/rows", "residual_block/rows", *ARGUMENTS, "--out", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "layer_norm/rows" in printed and "GFLOP/s" in printed and f"torch {torch.__version__}" in printed
    assert "other processes keep 1.5 cores busy" in printed
    assert sorted(path.name for path in folder.iterdir()) == ["bench.json", "bench.md", "bench.png"]
    found = json.loads((folder / "bench.json").read_text())
    assert found["ok"] and found["dtype"] == "float32" and found["warnings"]
    assert [(one["layer"], one["allocator"]) for one in found["rows"]] == [
        ("layer_norm", "default"),
        ("residual_block", "default"),
        ("layer_norm", "kept"),
        ("residual_block", "kept"),
    ]
    first = found["rows"][0]
    assert first["bytes"] > 0 and first["limit"] == pytest.approx(first["bytes"] / first["copy_bytes"])
    assert first["ratio"] == pytest.approx(first["sides"][TORCH]["seconds"] / first["sides"][NACRE]["seconds"])
    table = [line for line in (folder / "bench.md").read_text().splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert sum(line.startswith("| layer_norm/rows | 3x7 |") for line in table) == 2
    assert (folder / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_result_has_no_time_and_fails_the_command(in_this_process, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(LAYERS, "layer_norm", dataclasses.replace(LAYERS["layer_norm"], layer=ForgottenBias))
    arguments = ["bench", "layer_norm/rows", *ARGUMENTS, "--allocator", "kept", "--out", str(tmp_path)]
    assert main(arguments) == 1
    assert "WRONG: output is" in capsys.readouterr().out
    found = json.loads((tmp_path / "bench.json").read_text())
    (one,) = found["rows"]
    assert not found["ok"]
    assert one["sides"][NACRE]["seconds"] is None and one["ratio"] is None
    assert one["sides"][TORCH]["seconds"] > 0
    assert "WRONG" in (tmp_path / "bench.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["layernorm"], "got 'layernorm'. Did you mean 'layer_norm'?"),
        (["nothing like it"], "There are gelu, relu,"),
        (["layer_norm/txt"], "must be one of layer_norm's; got 'txt'. Did you mean 'text'?"),
        (["--rounds", "0"], "rounds of a benchmark must be greater than 0; got 0"),
        (["--seconds", "-1"], "seconds of a benchmark must be greater than 0; got -1"),
        (["--threads", "0"], "threads of a benchmark must be greater than 0; got 0"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is(arguments, message, capsys, tmp_path):
    assert main(["bench", *arguments, "--out", str(tmp_path / "none")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_names_and_options_choose_the_cases():
    assert {spec.name for spec, _ in selected()} == set(SPECS)
    assert all(case.bench for _, case in selected())
    assert len(selected(all_cases=True)) == sum(len(spec.cases) for spec in SPECS.values())
    assert [case.name for _, case in selected(["gelu/tanh", "relu/rows"][1:])] == ["rows"]
    with pytest.raises(ValueError, match="allocators default and kept; got 'jemalloc'"):
        bench(["layer_norm"], allocators=["jemalloc"])
    with pytest.raises(ValueError, match="float32, float64"):
        Settings(dtype="int8")


# ---- child processes and machine


def test_child_processes_measure(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    seen = []
    settings = dataclasses.replace(QUICK, threads=1)
    report = bench(["layer_norm/rows", "dropout/small"], settings=settings, allocators=["kept"], on_row=seen.append)
    assert report.ok and [one.sides for one in seen] == [one.sides for one in report.rows]
    assert [one.name for one in report.rows] == ["layer_norm/rows", "dropout/small"]
    assert all(side.seconds > 0 for one in report.rows for side in one.sides.values())
    assert report.machine.threads == 1
    assert report.ceilings.matrix_flops > 0 and report.ceilings.copy_bytes > 0


def test_a_child_that_dies_is_an_error(capfd):
    with pytest.raises(ChildProcessError, match="ended with status 1"):
        list(children.run_job({"job": "nothing"}, children.environment()))
    assert "KeyError" in capfd.readouterr().err


def test_the_environment_of_a_child(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    monkeypatch.setenv("OMP_DYNAMIC", "true")
    assert "MALLOC_TRIM_THRESHOLD_" not in children.environment("default")
    kept = children.environment("kept", threads=3)
    assert kept["MALLOC_MMAP_MAX_"] == "0" and kept["MALLOC_TRIM_THRESHOLD_"] == "2147483647"
    assert kept["OMP_NUM_THREADS"] == "3" and kept["OMP_DYNAMIC"] == "true"
    assert "OMP_DYNAMIC" not in children.environment(without=machine.CHANGING)


def test_the_load_by_others_does_not_count_this_process(monkeypatch):
    busy = iter([10.0, 10.75])
    monkeypatch.setattr(machine, "_busy_seconds", lambda: next(busy))
    assert machine.other_load(0.5) == 1.5
    monkeypatch.setattr(machine, "_busy_seconds", lambda: None)
    assert machine.other_load(0.01) is None
    assert "does not tell" in machine.warnings(None)[0]
    assert machine.warnings(0.1) == []
