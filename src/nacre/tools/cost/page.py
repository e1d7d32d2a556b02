"""Writes a bill as one HTML file that needs no other file and no network."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from nacre.layers import LAYERS
from nacre.tools import pages
from nacre.tools.bench.results import Machine
from nacre.tools.cost.report import CostReport
from nacre.tools.cost.text import own_label, shapes
from nacre.tools.formula import NAMES, cost_formula
from nacre.tools.overview.page import mathml
from nacre.tools.quantities import duration, quantity

Values = Mapping[str, Any]


def write_page(report: CostReport, path: Path) -> None:
    """Writes the page; no half-written one is ever seen."""
    pages.write(path, page(report.to_json()))


def page(bill: Values) -> str:
    """The page of a bill, from what ``CostReport.to_json`` returns."""
    environment = pages.templates()
    environment.filters["shapes"] = _shapes
    loader = environment.loader
    assert loader is not None
    script, _, _ = loader.get_source(environment, "cost.js")
    timed = bill["measured_seconds"] is not None
    expected = bill["predicted_seconds"] is not None
    calls: dict[str, list[Values]] = {}
    for row in bill["rows"]:
        if row["formula"]:
            calls.setdefault(row["formula"], []).append(row)
    return environment.get_template("cost.html").render(
        bill=bill,
        machine=None if bill["machine"] is None else str(Machine(**bill["machine"])),
        tiles=_tiles(bill),
        measures=_measures(timed, expected),
        columns=_columns(timed, expected),
        lines=_lines(bill, timed, expected),
        formulas=[(*_formulas(name), _sizes(rows)) for name, rows in calls.items()],
        data=_embedded({"ceilings": bill["ceilings"], "rows": _drawn(bill, timed, expected)}),
        library=Markup(get_plotlyjs()),
        script=Markup(script),
    )


def _embedded(values: Any) -> Markup:
    """JSON that no name in it can end the element of."""
    return Markup(json.dumps(values).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _formulas(name: str) -> tuple[str, str, str, list[tuple[str, Markup]]]:
    """A layer's class, its letters, how its cost grows, and its counts as formulas, for a usual call."""
    spec = LAYERS[name]
    with torch.device("meta"):
        cost = cost_formula(spec.layer(**spec.cases[0].arguments))
    counts = [(NAMES[count], mathml(cost.latex(count))) for count in _SHOWN if getattr(cost, count) != 0]
    counts += [(letter, mathml(cost.latex(letter))) for letter in cost.where]
    letters = ", ".join(f"{letter} {meaning}" for letter, meaning in cost.letters.items())
    return spec.layer.__name__, letters, cost.complexity, counts


def _sizes(rows: list[Values]) -> list[tuple[str, str]]:
    """What the letters stand for in the calls of the bill, the names of the calls that have them alike together."""
    alike: dict[str, list[str]] = {}
    for row in rows:
        sizes = ", ".join(f"{letter} = {number:,}" for letter, number in row["sizes"].items())
        alike.setdefault(sizes, []).append(row["name"] or "(model)")
    return [(_names(names), sizes) for sizes, names in alike.items()]


def _names(names: list[str]) -> str:
    shown = [name if names.count(name) == 1 else f"{name} ({names.count(name)} times)" for name in dict.fromkeys(names)]
    return ", ".join(shown if len(shown) <= 4 else [*shown[:2], f"... {len(shown) - 3} more ...", shown[-1]])


_SHOWN = ("parameters", "flops", "backward_flops", "elementwise_flops", "backward_elementwise_flops", "saved_bytes")


def _shapes(of: list[list[int]]) -> str:
    return shapes(tuple(tuple(shape) for shape in of))


def _tiles(bill: Values) -> list[tuple[str, str]]:
    tiles = [
        ("parameters", f"{bill['params']:,}"),
        ("of them trained", f"{bill['trainable_params']:,}"),
        ("FLOPs forward", quantity(bill["flops"])),
        ("FLOPs backward", quantity(bill["backward_flops"])),
        ("on single elements", quantity(bill["elementwise_flops"] + bill["backward_elementwise_flops"])),
        ("kept for the backward", f"{quantity(bill['saved_bytes'])}B"),
        ("memory at most", f"{quantity(bill['peak_bytes'])}B"),
    ]
    for label, key in (("expected", "predicted_seconds"), ("measured", "measured_seconds")):
        if bill[key] is not None:
            tiles.append((label, duration(bill[key])))
    if bill["converted_seconds"] is not None:
        tiles.append(("with nacre.convert", duration(bill["converted_seconds"])))
    if bill["share_of_limit"] is not None:
        tiles.append(("of the machine's limit", f"{bill['share_of_limit']:.0%}"))
    return tiles


def _measures(timed: bool, expected: bool) -> list[tuple[str, str]]:
    measures = [("flops", "FLOPs, forward and backward"), ("parameters", "parameters"), ("saved_bytes", "memory kept")]
    if expected:
        measures.append(("predicted_seconds", "time expected"))
    if timed:
        measures.append(("measured_seconds", "time measured"))
    return measures


def _columns(timed: bool, expected: bool) -> list[tuple[str, str, bool]]:
    columns = [("name", "module", False), ("kind", "class", False), ("inputs", "input", False)]
    columns += [("outputs", "output", False), ("parameters", "parameters", True), ("flops", "FLOPs", True)]
    columns += [("backward_flops", "backward", True), ("elementwise", "elementwise", True)]
    columns += [("saved_bytes", "kept", True), ("share", "share", True)]
    columns += [("predicted_seconds", "expected", True)] * expected
    columns += [("measured_seconds", "measured", True), ("share_of_limit", "of limit", True)] * timed
    return columns


def _lines(bill: Values, timed: bool, expected: bool) -> list[dict[str, Any]]:
    with_children = {row["parent"] for row in bill["rows"]}
    return [
        {
            "label": _label(row),
            "kind": row["kind"],
            "depth": row["depth"],
            "parent": row["parent"],
            "folds": place in with_children,
            "own": own_label(row["own_operations"])
            if place in with_children and any(row["own"][n] for n in _WORK)
            else "",
            "inputs": _shapes(row["inputs"]),
            "outputs": _shapes(row["outputs"]),
            "cells": _cells(row, timed, expected),
        }
        for place, row in enumerate(bill["rows"])
    ]


def _label(row: Values) -> str:
    return row["name"].rpartition(".")[2] if row["depth"] else "(model)"


def _cells(row: Values, timed: bool, expected: bool) -> list[tuple[str, float, float | None]]:
    """Text, number to sort by, and length of the bar behind it in percent, of each column of numbers."""
    total = row["total"]
    elementwise = total["elementwise_flops"] + total["backward_elementwise_flops"]
    share = round(100 * row["share"], 2)
    cells: list[tuple[str, float, float | None]] = [
        (f"{total['parameters']:,}", total["parameters"], None),
        (quantity(total["flops"]), total["flops"], None),
        (quantity(total["backward_flops"]), total["backward_flops"], None),
        (quantity(elementwise), elementwise, None),
        (f"{quantity(total['saved_bytes'])}B", total["saved_bytes"], None),
        (f"{share:.1f} %", share, share),
    ]
    if expected:
        cells.append((duration(row["predicted_seconds"]), row["predicted_seconds"] or 0.0, None))
    if timed:
        reached = row["share_of_limit"]
        cells.append((duration(row["measured_seconds"]), row["measured_seconds"] or 0.0, None))
        cells.append(("" if reached is None else f"{reached:.0%}", reached or 0.0, None))
    return cells


def _drawn(bill: Values, timed: bool, expected: bool) -> list[dict[str, Any]]:
    """What the charts show of each row: its own part, beside the rows within it."""
    rows = bill["rows"]
    within: list[dict[str, float]] = [{"predicted_seconds": 0.0, "measured_seconds": 0.0} for _ in rows]
    for row in rows:
        if row["parent"] is not None:
            for key, sums in within[row["parent"]].items():
                within[row["parent"]][key] = sums + (row[key] or 0.0)
    drawn = []
    with_children = {row["parent"] for row in rows}
    for place, (row, inner) in enumerate(zip(rows, within, strict=True)):
        own, total = row["own"], row["total"]
        seconds = row["measured_seconds"] if timed else row["predicted_seconds"]
        work, traffic = own["flops"] + own["backward_flops"], own["bytes"] + own["backward_bytes"]
        values = {
            "flops": sum(own[name] for name in _WORK),
            "parameters": own["parameters"],
            "saved_bytes": own["saved_bytes"],
        }
        text = {
            "flops": f"{quantity(sum(total[name] for name in _WORK))} FLOPs",
            "parameters": f"{total['parameters']:,} parameters",
            "saved_bytes": f"{quantity(total['saved_bytes'])}B kept",
        }
        for key in ("predicted_seconds",) * expected + ("measured_seconds",) * timed:
            values[key] = max((row[key] or 0.0) - inner[key], 0.0)
            text[key] = duration(row[key])
        # calls are timed one by one: what a call takes beside those within it is known only where there are none
        alone = not timed or place not in with_children
        own_seconds = (seconds or 0.0) - inner["predicted_seconds"] * (not timed) if alone else 0.0
        drawn.append(
            {
                "label": _label(row),
                "name": row["name"],
                "kind": row["kind"],
                "parent": row["parent"],
                "own": values,
                "text": text,
                "intensity": work / traffic if traffic else 0.0,
                "speed": work / own_seconds if work and own_seconds > 0 else 0.0,
            }
        )
    return drawn


_WORK = ("flops", "backward_flops", "elementwise_flops", "backward_elementwise_flops")
