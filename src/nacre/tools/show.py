"""Tables for the terminal."""

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from nacre.tools.quantities import quantity
from nacre.tools.table import LayerRow, layer_table

WIDTH = 150


def show_layers(console: Console | None = None) -> list[LayerRow]:
    """Prints the comparison table of all layers and returns its rows."""
    rows = layer_table()
    console = console or wide_console()
    table = Table(title="Layers, each with the bill of one call in float32", box=SIMPLE)
    for heading in ("layer", "purpose", "input"):
        table.add_column(heading, min_width=18 if heading == "purpose" else None)
    for heading in ("parameters", "FLOPs forward", "FLOPs backward", "kept for backward"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("complexity")
    for row in rows:
        bill = row.bill
        table.add_row(
            row.layer,
            row.purpose,
            row.input,
            f"{bill.parameters:,}",
            quantity(bill.flops + bill.elementwise_flops),
            quantity(bill.backward_flops + bill.backward_elementwise_flops),
            f"{quantity(bill.saved_bytes)}B",
            row.complexity,
        )
    console.print(table, highlight=False)
    return rows


def wide_console() -> Console:
    """The terminal, taken to be at least as wide as a table needs: a wrapped line reads better than a folded cell."""
    console = Console()
    return Console(width=max(console.width, WIDTH))
