"""One table of a small command, shown and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from bench.machine import describe_machine

Row = tuple[str, ...]


def show(title: str, header: Row, rows: Sequence[Row]) -> None:
    """Print a table; all columns but the first are numbers."""
    table = Table(title=title)
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def to_markdown(title: str, header: Row, rows: Sequence[Row], *facts: str) -> str:
    """The table under its title, the machine and further facts, a line each."""
    machine = ", ".join(f"{name}: {value}" for name, value in describe_machine().items())
    lines = [f"# {title}", "", machine, *facts, ""]
    lines += ["| " + " | ".join(row) + " |" for row in (header, ("---",) * len(header), *rows)]
    return "\n".join(lines) + "\n"
