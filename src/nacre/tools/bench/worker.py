"""The child process of ``nacre bench``: reads a job from standard input, writes what it finds as lines of JSON."""

import importlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch

from nacre.tools.bench import company, growth, training, vocabulary
from nacre.tools.bench.ceilings import measure_ceilings
from nacre.tools.bench.comparing import measured
from nacre.tools.bench.machine import describe
from nacre.tools.bench.results import Ceilings, Row
from nacre.tools.bench.selection import Settings, selected

_STUDIES = {
    "company": company.found,
    "growth": growth.found,
    "training": training.found,
    "vocabulary": vocabulary.found,
}


def jobs(job: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Does a job and yields what it finds.

    Args:
        job: ``"job"`` is ``"machine"``, ``"ceilings"``, ``"rows"`` (the cases, under the allocator of this process) or
            one of ``_STUDIES``; the others are its arguments.
    """
    if job["job"] in _STUDIES:
        yield from _STUDIES[job["job"]](job)
        return
    settings = Settings(**{**job["settings"], "names": tuple(job["settings"]["names"])})
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    if job["job"] == "machine":
        yield asdict(describe())
        return
    if job["job"] == "ceilings":
        yield asdict(measure_ceilings(settings))
        return
    if settings.compile:
        importlib.import_module("torch._inductor.compile_fx")  # once, before the forks: it takes as long as torch
    ceilings = Ceilings(**job["ceilings"])
    checked = {row.name: row for row in map(Row.from_json, job["checked"])}
    for spec, case in selected(settings.names, settings.all_cases):
        before = checked.get(f"{spec.name}/{case.name}")
        yield asdict(measured(spec, case, settings, job["allocator"], ceilings, before))


def main() -> int:
    """Does the job that standard input describes."""
    found = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what others print does not belong among what was found
    try:
        for one in jobs(json.load(sys.stdin)):
            print(json.dumps(one), file=found, flush=True)
    except (KeyboardInterrupt, BrokenPipeError):  # the parent has said so, or is gone
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
