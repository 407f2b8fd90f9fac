"""Tables: with rich on a terminal if it is installed, else as plain text."""

import importlib
from collections.abc import Sequence
from typing import Any

from benchmarks.report import Table


def show_table(table: Table) -> None:
    """Print a table and its notes."""
    console = terminal()
    if console is None:
        print("\n".join(as_text(table)))
        return
    console.print(as_rich(table))
    for note in table.notes:
        console.print(f"  {note}", highlight=False, markup=False)


def terminal() -> Any:
    """Rich's console; None without rich, and in a file, whose lines have no width."""
    try:
        console = importlib.import_module("rich.console").Console()
    except ImportError:
        return None
    return console if console.is_terminal else None


def as_rich(table: Table) -> Any:
    shown = importlib.import_module("rich.table").Table(title=table.title)
    for i, name in enumerate(table.header):
        shown.add_column(
            name, justify="right" if i else "left", overflow="fold", no_wrap=not i
        )
    for row in table.rows:
        shown.add_row(*row)
    if table.summary:
        shown.add_section()
    for row in table.summary:
        shown.add_row(*row)
    return shown


def as_text(table: Table) -> list[str]:
    """Columns under one another, the first to the left."""
    lines = [table.header, *table.rows, *table.summary]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    notes = [f"  {note}" for note in table.notes]
    return [table.title, *(input_dilation(line, widths) for line in lines), *notes]


def input_dilation(line: Sequence[str], widths: Sequence[int]) -> str:
    cells = zip(line, widths, strict=True)
    padded = (
        f"{cell:>{w}}" if i else f"{cell:<{w}}" for i, (cell, w) in enumerate(cells)
    )
    return "  ".join(padded).rstrip()
