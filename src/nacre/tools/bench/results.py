"""What a benchmark found, and the arithmetic on it."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

TORCH, COMPILED, NACRE = SIDES = ("torch.nn", "torch.compile", "nacre")
COPY = "copy"  # timed beside them for the bandwidth


@dataclass(frozen=True)
class Ceilings:
    """What this machine can do at best, measured.

    Args:
        matrix_flops: FLOPs a second of the best large matrix product.
        copy_bytes: bytes a second, read and written together, of the best large copy.
    """

    matrix_flops: float
    copy_bytes: float

    def seconds(self, flops: int, bytes: int) -> float:
        """The least time that a call can take: that of its matrix products or of its traffic, whichever is longer.

        Example:
            >>> Ceilings(matrix_flops=100.0, copy_bytes=10.0).seconds(flops=100, bytes=20)
            2.0
        """
        return max(flops / self.matrix_flops, bytes / self.copy_bytes)


@dataclass(frozen=True)
class Side:
    """What one side of a comparison took for a step, or why it was not timed.

    Args:
        seconds: median over the rounds; None where the side was not timed.
        page_faults: minor page faults of a step, median over the rounds.
        rounds: how many there were.
        problem: why the side was not timed.
        wrong: whether that was a wrong result or an error, not a compiler which could not.
    """

    seconds: float | None = None
    page_faults: float | None = None
    rounds: int = 0
    problem: str = ""
    wrong: bool = False


@dataclass(frozen=True)
class Row:
    """One case of a layer under one allocator.

    Args:
        layer: name of the layer or block.
        case: name of the case.
        call: the class with the arguments of its constructor.
        inputs: the shapes of the inputs.
        allocator: ``"default"`` or ``"kept"``.
        implementation: what nacre ran: kernels, formulas or both.
        flops: of matrix products, forward and backward.
        bytes: compulsory traffic, forward and backward.
        copy_bytes: bytes a second that copies read and write, measured in the same rounds.
        limit: the least seconds that this machine needs for FLOPs and traffic.
        sides: what each side took, by its name.
    """

    layer: str
    case: str
    call: str
    inputs: str
    allocator: str
    implementation: str
    flops: int
    bytes: int
    copy_bytes: float
    limit: float
    sides: Mapping[str, Side]

    @property
    def name(self) -> str:
        """Layer and case together, as ``nacre bench`` takes them."""
        return f"{self.layer}/{self.case}"

    @property
    def ratio(self) -> float | None:
        """How many times as long as nacre torch.nn takes."""
        return self._ratio(TORCH)

    @property
    def best_ratio(self) -> float | None:
        """How many times as long as nacre the faster of torch.nn and torch.compile takes."""
        return min((ratio for side in (TORCH, COMPILED) if (ratio := self._ratio(side)) is not None), default=None)

    def share(self, side: str) -> float | None:
        """How much of the limit a side reaches: 1 is the limit itself."""
        seconds = self._seconds(side)
        return None if seconds is None else self.limit / seconds

    @property
    def wrong(self) -> bool:
        """Whether a side was refused for its result."""
        return any(side.wrong for side in self.sides.values())

    def _seconds(self, side: str) -> float | None:
        return self.sides[side].seconds if side in self.sides else None

    def _ratio(self, side: str) -> float | None:
        theirs, ours = self._seconds(side), self._seconds(NACRE)
        return None if theirs is None or ours is None else theirs / ours

    def as_json(self) -> dict[str, Any]:
        """All fields, with what follows from them."""
        derived = {"ratio": self.ratio, "best_ratio": self.best_ratio}
        return {**asdict(self), **derived, "share_of_limit": {side: self.share(side) for side in self.sides}}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "Row":
        """A row from what ``dataclasses.asdict`` made of it."""
        return Row(**{**values, "sides": {name: Side(**side) for name, side in values["sides"].items()}})


@dataclass(frozen=True)
class Machine:
    """Where a benchmark ran, and with what.

    Args:
        processor: its name.
        cores: logical ones that the process may use.
        instructions: the best instruction set that torch finds.
        threads: of torch.
        kernels: whether nacre's C++ kernels are there; otherwise why not.
        versions: of torch, nacre, Python and the operating system.
        environment: variables which change how torch computes.
    """

    processor: str
    cores: int
    instructions: str
    threads: int
    kernels: str
    versions: Mapping[str, str]
    environment: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        text = (
            f"{self.processor}, {self.cores} cores, {self.instructions}, {self.threads} threads; {versions};"
            f" kernels {self.kernels}"
        )
        if self.environment:
            text += "; " + " ".join(f"{name}={value}" for name, value in self.environment.items())
        return text


@dataclass
class BenchReport:
    """What :func:`nacre.tools.bench.bench` found.

    Attributes:
        machine: where.
        dtype: of the inputs and parameters.
        ceilings: what the limits were computed from.
        rows: one for each case and allocator.
        warnings: what speaks against trusting the times.
    """

    machine: Machine
    dtype: str
    ceilings: Ceilings
    rows: list[Row] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def raise_peak(self, matrix_flops: float) -> None:
        """Takes a higher peak of matrix products for the ceiling of all rows; a lower one changes nothing."""
        if matrix_flops <= self.ceilings.matrix_flops:
            return
        self.ceilings = replace(self.ceilings, matrix_flops=matrix_flops)
        for index, row in enumerate(self.rows):
            limit = replace(self.ceilings, copy_bytes=row.copy_bytes).seconds(row.flops, row.bytes)
            self.rows[index] = replace(row, limit=limit)

    @property
    def ok(self) -> bool:
        """Whether every side that ran gave the right result."""
        return not any(row.wrong for row in self.rows)

    def allocators(self) -> list[str]:
        """The allocators that were measured, in their order."""
        return list(dict.fromkeys(row.allocator for row in self.rows))

    def under(self, allocator: str) -> list[Row]:
        """The rows of one allocator."""
        return [row for row in self.rows if row.allocator == allocator]

    @property
    def limits(self) -> str:
        """What the limits were computed from, in one line."""
        return (
            f"limit: {self.ceilings.matrix_flops / 1e9:.0f} GFLOP/s in matrix products of {self.dtype},"
            f" {self.ceilings.copy_bytes / 1e9:.1f} GB/s read and written in copies;"
            " the limit of a case takes the copies measured beside it"
        )

    def header(self) -> list[str]:
        """Machine, limits and warnings in words, a line each."""
        return [f"{self.machine}; {self.dtype}", self.limits, *(f"WARNING: {text}" for text in self.warnings)]

    def summary(self, allocator: str) -> str:
        """The geometric means over the cases of one allocator, in one line.

        A case that one side could not run is in none of the means, so that all of them are over the same cases.
        """
        rows = [row for row in self.under(allocator) if row.ratio is not None]
        if not rows:
            return "no case was timed on both sides"
        ratio, torchs, ours = (
            geometric_mean(value for row in rows if (value := of(row)))
            for of in (lambda row: row.ratio, lambda row: row.share(TORCH), lambda row: row.share(NACRE))
        )
        return (
            f"{len(rows)} cases, geometric means: torch.nn takes {ratio:.2f} times as long as nacre;"
            f" torch.nn reaches {torchs:.0%} of the limit, nacre {ours:.0%}"
        )

    def as_json(self) -> dict[str, Any]:
        """Everything, as ``json.dump`` takes it."""
        return {
            "machine": asdict(self.machine),
            "dtype": self.dtype,
            "ceilings": asdict(self.ceilings),
            "warnings": self.warnings,
            "ok": self.ok,
            "rows": [row.as_json() for row in self.rows],
        }


def geometric_mean(values: Iterable[float]) -> float:
    """The geometric mean; NaN of nothing.

    Example:
        >>> round(geometric_mean([1.0, 4.0]), 6)
        2.0
    """
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else math.nan
