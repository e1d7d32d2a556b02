"""Two bills side by side, row by row."""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from nacre.core.cost import Cost
from nacre.tools.cost.report import CostReport, CostRow
from nacre.tools.cost.text import aligned
from nacre.tools.quantities import duration, quantity


@dataclass(frozen=True)
class Pair:
    """The same call in two models; None where only one of them has it."""

    one: CostRow | None
    other: CostRow | None

    @property
    def row(self) -> CostRow:
        """The row of the first model, or else of the second."""
        found = self.one or self.other
        assert found is not None
        return found


@dataclass(frozen=True)
class Comparison:
    """What differs between two bills.

    Attributes:
        one: the first bill.
        other: the second.
        pairs: their rows, matched by the module's name and the number of the call.
    """

    one: CostReport
    other: CostReport
    pairs: tuple[Pair, ...]

    def table(self, depth: int | None = None) -> str:
        """A line for each call: the first model's numbers, and how the second's differ.

        Args:
            depth: leave out what lies deeper. Default: nothing is left out.
        """
        headings = ["module", "one", "other", "params", "", "FLOPs", "", "backward", "", "kept", ""]
        timed = all(report.rows[0].measured_seconds is not None for report in (self.one, self.other))
        expected = all(report.rows[0].predicted_seconds is not None for report in (self.one, self.other))
        headings += ["measured" if timed else "expected", ""] * (timed or expected)
        lines = [headings]
        for pair in self.pairs:
            if depth is not None and pair.row.depth > depth:
                continue
            one, other = (row.total if row else None for row in (pair.one, pair.other))
            label = "  " * pair.row.depth + (pair.row.name.rpartition(".")[2] if pair.row.depth else "(model)")
            cells = [label, pair.one.kind if pair.one else "-", pair.other.kind if pair.other else "-"]
            for name in ("parameters", "flops", "backward_flops", "saved_bytes"):
                cells += _difference(one, other, name)
            if timed or expected:
                times = [_seconds(row, timed) for row in (pair.one, pair.other)]
                cells += [duration(times[0]) or "-", _ratio(*times)]
            lines.append(cells)
        return "\n".join([*aligned(lines, left=3), "", *self.summary()])

    def summary(self) -> list[str]:
        """The totals of both, a line each."""
        lines = []
        for label, name in (("parameters", "params"), ("FLOPs", "flops"), ("backward", "backward_flops")):
            lines.append(f"{label:11} {getattr(self.one, name):,} -> {getattr(self.other, name):,}")
        for label, name in (("kept", "saved_bytes"), ("at most", "peak_bytes")):
            sizes = [getattr(report, name) for report in (self.one, self.other)]
            lines.append(f"{label:11} {quantity(sizes[0])}B -> {quantity(sizes[1])}B ({_ratio(*sizes)})")
        for label, timed in (("expected", False), ("measured", True)):
            times = [_seconds(report.rows[0], timed) for report in (self.one, self.other)]
            if None not in times:
                lines.append(f"{label:11} {duration(times[0])} -> {duration(times[1])} ({_ratio(*times)})")
        return lines

    def to_json(self) -> dict[str, Any]:
        """Both bills, and the differences by row, as ``json.dump`` takes it."""
        rows = []
        for pair in self.pairs:
            one, other = (asdict(row.total if row else Cost()) for row in (pair.one, pair.other))
            rows.append(
                {
                    "name": pair.row.name,
                    "in_one": pair.one is not None,
                    "in_other": pair.other is not None,
                    "difference": {name: other[name] - one[name] for name in one},
                }
            )
        return {"one": self.one.to_json(), "other": self.other.to_json(), "rows": rows}

    def __str__(self) -> str:
        return self.table()


def compare(one: CostReport, other: CostReport) -> Comparison:
    """Puts two bills side by side.

    Args:
        one: the bill of a model.
        other: that of another configuration of it, or of other layers.

    Example:
        >>> import torch, nacre
        >>> from nacre.tools.cost import compare
        >>> x = torch.empty(10, 8, device="meta")
        >>> both = compare(nacre.cost(torch.nn.Linear(8, 16), x), nacre.cost(torch.nn.Linear(8, 32), x))
        >>> both.to_json()["rows"][0]["difference"]["flops"]
        2560
    """
    others = dict(_numbered(other))
    ones = dict(_numbered(one))
    order = list(ones)
    for place, key in enumerate(others):
        if key not in ones:  # after the call that it follows in the second model
            following = list(others)[place - 1] if place else None
            order.insert(order.index(following) + 1 if following in order else 0, key)
    return Comparison(one, other, tuple(Pair(ones.get(key), others.get(key)) for key in order))


def _numbered(report: CostReport) -> list[tuple[tuple[str, int], CostRow]]:
    calls: Counter[str] = Counter()
    found = []
    for row in report.rows:
        found.append(((row.name, calls[row.name]), row))
        calls[row.name] += 1
    return found


def _difference(one: Cost | None, other: Cost | None, name: str) -> list[str]:
    first, second = (None if bill is None else getattr(bill, name) for bill in (one, other))
    unit = "B" if name.endswith("bytes") else ""
    if first is None or second is None:
        return [f"{quantity(number)}{unit}" if number is not None else "-" for number in (first, second)]
    change = second - first
    return [quantity(first) + unit, f"{'+' if change > 0 else ''}{quantity(change)}{unit}" if change else "="]


def _seconds(row: CostRow | None, measured: bool) -> float | None:
    if row is None:
        return None
    return row.measured_seconds if measured else row.predicted_seconds


def _ratio(one: float | None, other: float | None) -> str:
    return f"x {other / one:.2f}" if one and other is not None else "-"
