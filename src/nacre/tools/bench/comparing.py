"""One case: its sides are checked first, then timed, each in a forked process."""

import multiprocessing
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from nacre.core.cost import Cost
from nacre.core.spec import Case, LayerSpec
from nacre.tools.bench.agreement import Judge
from nacre.tools.bench.measuring import measure
from nacre.tools.bench.results import COMPILED, COPY, NACRE, SIDES, TORCH, Ceilings, Row, Side
from nacre.tools.bench.selection import DTYPES, Settings
from nacre.tools.bench.sides import Step, build, compiled, implementation
from nacre.tools.table import call_of, shapes_of

_LONGEST_ERROR = 200
"""Characters of an error that are reported: a compiler's errors are pages long."""


def measured(
    spec: LayerSpec, case: Case, settings: Settings, allocator: str, ceilings: Ceilings, checked: Row | None = None
) -> Row:
    """Checks one case, then times the sides that are right; each apart, so that what ran before cannot matter.

    Args:
        spec: of the layer.
        case: of the layer.
        settings: how to measure.
        allocator: of this process.
        ceilings: what the limit follows from.
        checked: the same case under another allocator, whose checks hold here too.
    """
    try:
        if checked is None:
            refused, ran = apart(check_case, spec, case, settings)
        else:
            refused = {name: side for name, side in checked.sides.items() if side.problem}
            ran = checked.implementation
        timed = apart(time_case, spec, case, settings, frozenset(refused))
    except ChildProcessError as error:
        refused, ran, timed = {NACRE: Side(problem=str(error), wrong=True)}, "", {}
    if COPY in timed:
        # how much of its bandwidth a shared machine gives changes by the minute: the limit is that of these very rounds
        ceilings = replace(ceilings, copy_bytes=2 * _copied_beside(settings) / timed[COPY].seconds)
    bill, shapes = apart(bill_of, spec, case, DTYPES[settings.dtype])
    flops, traffic = bill.flops + bill.backward_flops, bill.bytes + bill.backward_bytes
    sides = {**refused, **timed}
    return Row(
        layer=spec.name,
        case=case.name,
        call=call_of(spec, case),
        inputs=shapes,
        allocator=allocator,
        implementation=ran,
        flops=flops,
        bytes=traffic,
        copy_bytes=ceilings.copy_bytes,
        limit=ceilings.seconds(flops, traffic),
        sides={name: sides[name] for name in SIDES if name in sides},
    )


def bill_of(spec: LayerSpec, case: Case, dtype: torch.dtype) -> tuple[Cost, str]:
    """What a case costs, and the shapes of its inputs."""
    layer, _ = build(spec, case, dtype)
    inputs, keywords = case.make(dtype)
    return spec.cost(**spec.sizes(layer, *inputs, **keywords)), shapes_of(inputs)


def check_case(spec: LayerSpec, case: Case, settings: Settings) -> tuple[dict[str, Side], str]:
    """Which sides are not to be timed, and what nacre runs."""
    steps, reference = _steps(spec, case, settings)
    try:
        judge = Judge(case, reference, DTYPES[settings.dtype])
    except Exception as error:  # whatever torch raises where it has no such operation
        return {name: Side(problem=f"torch.nn's own fails: {_first_line(error)}", wrong=True) for name in steps}, ""
    refused, ran = {}, ""
    for name, make in steps.items():
        try:
            step = make()
            problem, wrong = judge.problem(step), True
            if name == NACRE:
                ran = implementation(step)
        except Exception as error:  # a compiler that cannot is to be reported, of whichever kind its error is
            problem, wrong = _first_line(error), name != COMPILED
        if problem:
            refused[name] = Side(problem=problem, wrong=wrong)
    return refused, ran


def time_case(spec: LayerSpec, case: Case, settings: Settings, refused: Collection[str]) -> dict[str, Side]:
    """The times of the sides that were not refused, and of a copy beside them."""
    steps, _ = _steps(spec, case, settings)
    ready: dict[str, Callable[[], object]] = {name: make() for name, make in steps.items() if name not in refused}
    if ready:
        source, destination = torch.ones(2, max(_copied_beside(settings) // 4, 1))
        ready[COPY] = lambda: destination.copy_(source)
    return measure(ready, settings.rounds, settings.seconds)


def _copied_beside(settings: Settings) -> int:
    return settings.copied_bytes // 4


def _steps(spec: LayerSpec, case: Case, settings: Settings) -> tuple[dict[str, Callable[[], Step]], nn.Module]:
    """How to make the step of every side, and the layer that judges: torch.nn's, or nacre's where torch has none."""
    dtype = DTYPES[settings.dtype]
    layer, reference = build(spec, case, dtype)
    inputs, keywords = case.make(dtype)
    steps = {NACRE: lambda: Step(layer, inputs, keywords)}
    if reference is None:
        return steps, layer
    steps[TORCH] = lambda: Step(reference, inputs, keywords)
    if settings.compile:
        steps[COMPILED] = lambda: Step(reference, inputs, keywords, compiled(reference))
    return steps, reference


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns, computed in a forked process; in this one where the system cannot fork.

    This process only forks and never computes, so that each case finds memory as a fresh process has it, without
    waiting for torch to load again.

    Raises:
        ChildProcessError: the forked process died.
    """
    if "fork" not in multiprocessing.get_all_start_methods():
        return function(*arguments)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(function(*arguments)))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        raise ChildProcessError(f"the process ended with status {process.exitcode}") from None
    finally:
        process.kill()
        process.join()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:_LONGEST_ERROR]
