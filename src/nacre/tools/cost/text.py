"""The bill as text."""

from collections.abc import Iterable, Iterator

from nacre.core.cost import Cost
from nacre.tools.cost.report import CostReport, CostRow
from nacre.tools.quantities import duration, quantity


def own_label(names: Iterable[str]) -> str:
    """What a call does beside the calls within it.

    Example:
        >>> own_label(["residual + dropout + norm", "add"])
        '(own: residual + dropout + norm, add)'
    """
    return f"(own: {', '.join(names) or 'operations'})"


def shapes(of: tuple[tuple[int, ...], ...]) -> str:
    """Shapes as a reader writes them.

    Example:
        >>> shapes(((2, 3), (4,), ()))
        '2x3, 4, 1'
    """
    return ", ".join("x".join(map(str, shape)) or "1" for shape in of)


def table(report: CostReport, depth: int | None = None) -> str:
    """The bill as text, a line for each row down to a depth; what a call does beside the calls in it has its own."""
    timed = report.rows[0].measured_seconds is not None
    headings = ["module", "class", "input", "output", "params", "FLOPs", "backward", "elementwise", "kept", "share"]
    headings += ["expected"] * (report.rows[0].predicted_seconds is not None)
    headings += ["forward", "backward", "limit", "of limit"] * timed
    lines = [headings]
    for row, bill, label in _lines(report, depth):
        cells = [label, row.kind if bill is row.total else "", shapes(row.inputs), shapes(row.outputs)]
        if bill is not row.total:
            cells[1:] = ["", "", ""]
        work = (bill.flops, bill.backward_flops, bill.elementwise_flops + bill.backward_elementwise_flops)
        cells += [f"{bill.parameters:,}", *map(quantity, work), f"{quantity(bill.saved_bytes)}B", _share(report, bill)]
        whole = bill is row.total
        if report.rows[0].predicted_seconds is not None:
            cells.append(duration(row.predicted_seconds) if whole else "")
        if timed:
            cells += (
                [duration(row.measured_forward_seconds), duration(row.measured_backward_seconds)] if whole else [""] * 2
            )
            cells.append(duration(row.limit_seconds) if whole else "")
            cells.append("" if row.share_of_limit is None or not whole else f"{row.share_of_limit:.0%}")
        lines.append(cells)
    return "\n".join([*aligned(lines, left=4), "", *summary(report)])


def summary(report: CostReport) -> list[str]:
    """The totals, a line each."""
    total = report.total
    lines = [
        f"parameters  {report.params:,}, of which {report.trainable_params:,} are trained",
        f"FLOPs       {total.flops:,} forward, {total.backward_flops:,} backward,"
        f" and {total.elementwise_flops:,} and {total.backward_elementwise_flops:,} on single elements",
        f"traffic     {quantity(total.bytes)}B forward, {quantity(total.backward_bytes)}B backward",
        f"memory      {quantity(total.saved_bytes)}B kept for the backward, {quantity(report.peak_bytes)}B at most,"
        f" of which parameters and buffers {quantity(report.parameter_bytes)}B",
    ]
    root = report.rows[0]
    if root.predicted_seconds is not None:
        lines.append(f"time        {duration(root.predicted_seconds)} to be expected, forward and backward")
    if root.measured_seconds is not None:
        reached = "" if root.share_of_limit is None else f", {root.share_of_limit:.0%} of what the machine can do"
        lines.append(f"            {duration(root.measured_seconds)} measured{reached}")
    if root.measured_seconds and report.converted_seconds:
        times = root.measured_seconds / report.converted_seconds
        lines.append(f"            {duration(report.converted_seconds)} with nacre.convert: {times:.2f} times as fast")
    lines += [f"WARNING     {text}" for text in report.warnings]
    if report.unknown:
        names = ", ".join(f"{name} ({count})" for name, count in sorted(report.unknown.items()))
        lines.append(f"NOT COUNTED, only their traffic: {names}")
    if report.real:
        lines.append("The model ran on real numbers: it decides by values.")
    return lines


def _lines(report: CostReport, depth: int | None) -> Iterator[tuple[CostRow, Cost, str]]:
    with_children = {row.parent for row in report.rows}
    for place, row in enumerate(report.rows):
        if depth is not None and row.depth > depth:
            continue
        yield row, row.total, "  " * row.depth + (row.name.rpartition(".")[2] if row.depth else "(model)")
        if place in with_children and work(row.own) and (depth is None or row.depth < depth):
            yield row, row.own, "  " * (row.depth + 1) + own_label(row.own_operations)


def work(bill: Cost) -> int:
    """All FLOPs of a bill together."""
    return bill.flops + bill.backward_flops + bill.elementwise_flops + bill.backward_elementwise_flops


def _share(report: CostReport, bill: Cost) -> str:
    whole = work(report.total)
    return f"{work(bill) / whole:.1%}" if whole else ""


def aligned(lines: list[list[str]], left: int) -> list[str]:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
