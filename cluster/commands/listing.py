"""Lists on a terminal: a table if it fits, else several lines per entry. Names are never cut."""

from collections.abc import Sequence
from typing import Literal

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from trainer.record.terminal import Console

LEAST_NOTE = 24
"""Characters that a table must leave for its last column, whose text may wrap."""


def listing(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> RenderableType:
    """Rows of text under their columns, without the columns that are empty in every row.

    Args:
        columns: the first two hold text, the last one text that may be long, those between hold numbers.
    """
    used = [i for i in range(len(columns)) if i < 2 or any(row[i] for row in rows)]
    note = len(columns) - 1
    middle = [i for i in used if 2 <= i < note]
    widths = {i: max(len(columns[i]), *(len(row[i]) for row in rows)) for i in used}
    if not console.is_terminal:  # a file or pipe has no width, and its reader wants whole names
        lines = [
            "  ".join(row[i].rjust(widths[i]) if i in middle else row[i].ljust(widths[i]) for i in used).rstrip()
            for row in (columns, *rows)
        ]
        return Text("\n".join(lines))
    if sum(widths[i] + 2 for i in used if i != note) + min(widths.get(note, 0), LEAST_NOTE) <= console.width:
        table = Table(box=None, pad_edge=False)
        for i in used:
            justify: Literal["left", "right"] = "right" if i in middle else "left"
            table.add_column(columns[i], justify=justify, no_wrap=i != note, overflow="fold")
        for row in rows:
            table.add_row(*(row[i] for i in used))
        return table
    entries: list[RenderableType] = []
    for row in rows:
        numbers = ", ".join(f"{columns[i]} {row[i]}" for i in middle if row[i])
        entries.append(Text(f"{row[0]}  {row[1]}", no_wrap=True, overflow="ignore"))  # the terminal wraps it
        entries += [Padding(Text(text), (0, 0, 0, 2)) for text in (numbers, row[note]) if text]
    return Group(*entries)


def show(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a listing."""
    console.print(listing(console, columns, rows), soft_wrap=not console.is_terminal, crop=False)
