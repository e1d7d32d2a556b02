"""The result of a gradient check: one line for each comparison, a table, and the error that may be raised."""

import math
from dataclasses import dataclass, field

from torch.autograd.gradcheck import GradcheckError


@dataclass(frozen=True)
class GradientResult:
    """One comparison of the gradient of one tensor.

    Attributes:
        name: the tensor: ``"input 0"``, the name of a keyword input, or of a parameter.
        output: which output is differentiated.
        comparison: what the gradient is compared with: ``"finite differences"``, ``"random directions"`` or
            ``"reference"``.
        ok: whether all compared entries agree.
        compared: how many entries (or directions) were compared.
        entries: how many entries the tensor has.
        wrong: how many of the compared do not agree.
        kinks: how many entries lie on a kink, where any value between the one-sided slopes passes.
        max_absolute_error: largest difference.
        max_relative_error: largest difference relative to the greater of the two values, or to the smallest value
            that the comparison can resolve, where that is greater.
        index: the entry which is worst in units of its tolerance; None where there is none, or a failed direction
            could not be traced to an entry.
        analytic: the value of the backward there.
        expected: the value it is compared with.
        tolerance: the difference allowed there.
        hint: the likely cause, where a pattern is recognised.
        order: 1, or 2 for the gradient of a gradient.
    """

    name: str
    output: str
    comparison: str
    ok: bool
    compared: int
    entries: int
    wrong: int = 0
    kinks: int = 0
    max_absolute_error: float = 0.0
    max_relative_error: float = 0.0
    index: tuple[int, ...] | None = None
    analytic: float = 0.0
    expected: float = 0.0
    tolerance: float = 0.0
    hint: str = ""
    order: int = 1

    @property
    def label(self) -> str:
        return f"d {self.output} / d {self.name}"

    def __str__(self) -> str:
        if self.ok:
            return f"{self.label} agrees with {self.comparison} (relative error {self.max_relative_error:.1e})"
        where = f"at {self.index} it is" if self.index is not None else "along the worst direction it gives"
        text = (
            f"{self.label} is wrong at {self.wrong} of {self.compared} compared, worst {where} {self.analytic:.8g} "
            f"where {_SUBJECT[self.comparison]} "
        )
        if math.isnan(self.expected):
            text += "no value"
        else:
            error = abs(self.analytic - self.expected)
            text += f"{self.expected:.8g} (off by {error:.3g}, {self.tolerance:.1g} allowed)"
        return text + (f"; likely cause: {self.hint}" if self.hint else "")


_SUBJECT = {
    "finite differences": "finite differences give",
    "random directions": "finite differences give",
    "reference": "the reference gives",
}

_HEADER = (
    "gradient of", "output", "compared with", "entries", "max abs err", "max rel err", "worst at", "analytic",
    "expected", "verdict",
)  # fmt: skip


@dataclass(frozen=True)
class GradientReport:
    """What :func:`nacre.gradcheck` found. True in a condition where every gradient is right.

    Attributes:
        name: of the checked layer or function.
        results: every comparison, in the order inputs, parameters.
        problems: findings that are not about one entry: an exception, a result that changes from call to call.
        notes: what was left out or sampled, and what else is worth knowing.
    """

    name: str
    results: tuple[GradientResult, ...] = ()
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def ok(self) -> bool:
        return not self.problems and all(result.ok for result in self.results)

    def __bool__(self) -> bool:
        return self.ok

    @property
    def failures(self) -> tuple[GradientResult, ...]:
        """The comparisons which do not agree."""
        return tuple(result for result in self.results if not result.ok)

    def summary(self) -> str:
        """The report in one line."""
        if self.problems:
            return f"{self.name}: FAILED, {self.problems[0]}"
        if self.failures:
            return f"{self.name}: WRONG, {self.failures[0]}"
        tensors = list(dict.fromkeys(result.name for result in self.results if result.order == 1))
        named = ", ".join(tensors[:4]) + (", ..." if len(tensors) > 4 else "")
        second = ", second order too" if any(result.order == 2 for result in self.results) else ""
        worst = max((result.max_relative_error for result in self.results), default=0.0)
        return f"{self.name}: ok, right gradients of {named}{second}; relative error at most {worst:.0e}"

    def __str__(self) -> str:
        lines = [f"gradient check of {self.name}: {'ok' if self.ok else 'FAILED'}"]
        if self.results:
            rows = [_HEADER, *map(_row, self.results)]
            widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
            lines += [
                "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                for row in rows
            ]
        lines += [f"  failed: {problem}" for problem in self.problems]
        lines += [f"  wrong: {failure}" for failure in self.failures]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


class GradientError(GradcheckError):
    """A gradient is wrong. Carries the :class:`GradientReport` as ``report``.

    It is a ``GradcheckError``, and so a ``RuntimeError``, as ``torch.autograd.gradcheck`` raises: code that catches
    the one catches the other. An ``AssertionError`` it is not, since it reports a fact about the caller's function,
    not a broken promise of the checker.
    """

    def __init__(self, report: GradientReport) -> None:
        self.report = report
        causes = [*report.problems, *map(str, report.failures)]
        super().__init__(f"{report.name}: {'; '.join(causes)}")


def _row(result: GradientResult) -> tuple[str, ...]:
    verdict = "ok" if result.ok else "WRONG"
    if result.kinks:
        verdict += f", {result.kinks} kink{'s' * (result.kinks > 1)}"
    place: tuple[str, ...] = ("-", "-", "-")
    if result.compared and (result.index is not None or not result.ok):
        index = "-" if result.index is None else str(result.index)
        place = (index, f"{result.analytic:.6g}", f"{result.expected:.6g}")
    return (
        result.name,
        result.output,
        result.comparison,
        _count(result),
        f"{result.max_absolute_error:.1e}",
        f"{result.max_relative_error:.1e}",
        *place,
        verdict,
    )


def _count(result: GradientResult) -> str:
    if result.comparison == "random directions":
        return f"{result.compared} directions"
    return str(result.compared) if result.compared == result.entries else f"{result.compared} of {result.entries}"
