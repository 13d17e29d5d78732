"""Tables for the terminal and for Markdown."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Text cells under column heads; the first column is left-aligned, the others right-aligned."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str]


def show_tables(head: list[str], tables: list[Table], *, markdown: bool) -> None:
    """Prints the lines of `head`, then the tables, to standard output."""
    if markdown:
        print("\n\n".join([*(f"`{line}`" if line.startswith("python -m") else line for line in head)]))
        for table in tables:
            print("\n" + _markdown(table))
        return
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    for line in head:
        console.print(line, style="dim", highlight=False)
    for table in tables:
        console.print(_rich(table))
        for note in table.notes:
            console.print(f"  {note}", style="dim", highlight=False)


def _markdown(table: Table) -> str:
    lines = [table.columns, ["---", *["---:"] * (len(table.columns) - 1)], *table.rows]
    body = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return f"**{table.title}**\n\n{body}\n" + "".join(f"\n- {note}" for note in table.notes)


def _rich(table: Table) -> object:
    from rich.table import Table as RichTable

    shown = RichTable(title=table.title, title_justify="left")
    for index, column in enumerate(table.columns):
        shown.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for cells in table.rows:
        shown.add_row(*cells, style="bold" if cells[0].startswith("fastrerank") else None)
    return shown
