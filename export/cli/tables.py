"""Rows for people: a table where it fits the terminal, else a block per row; what is copied is never cut or broken."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console

Cell = str | Text
GAP = 2  # one of it is the divider that Rich draws of blanks
# What a line is not broken in: a word, and commands with what stands close to them.
WHOLE = re.compile(r"(?:`[^`]*`|pip install(?: --[\w-]+)*(?:(?: '[^']*')+| \S+)|\S)+")


def print_rows(
    console: Console,
    heads: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    title: str | None = None,
    blocks: tuple[Sequence[str], Sequence[Sequence[Cell]]] | None = None,
) -> None:
    """Print `rows` under `heads`; texts are taken as they are, never as markup. Numbers stand on the right.

    `blocks` are heads and rows of the blocks where these are to be others, as of a table that stands on its side.
    """
    if title is not None:
        console.print(Text(title, "bold"))
    cells = [[cell if isinstance(cell, Text) else Text(cell) for cell in row] for row in rows]
    said = [number for number, head in enumerate(heads) if not number or any(str(row[number]) for row in cells)]
    heads, cells = [heads[number] for number in said], [[row[number] for number in said] for row in cells]
    table = _table(heads, cells)
    if console.measure(table, options=console.options.update_width(sys.maxsize)).maximum <= console.width:
        console.print(table)
        return
    narrow = (heads, cells) if blocks is None else blocks
    for row in narrow[1]:
        _print_block(console, narrow[0], [cell if isinstance(cell, Text) else Text(cell) for cell in row])


def print_wrapped(console: Console, text: str, indent: int = 0, first: str = "", style: str | None = None) -> None:
    """Print a sentence after `first`, broken between words and indented where it goes on."""
    width = max(console.width - indent, 20)
    lines, line = [], ""
    for word in WHOLE.findall(text):
        if line and cell_len(line) + 1 + cell_len(word) > width:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}" if line else word
    lines.append(line)
    for number, part in enumerate(lines):
        start = first.ljust(indent) if number == 0 else " " * indent
        console.print(Text.assemble((start, "dim"), (part, style or "")), soft_wrap=True)


def _table(heads: Sequence[str], cells: Sequence[Sequence[Text]]) -> Table:
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False, show_edge=False, padding=(0, GAP - 1, 0, 0))
    for number, head in enumerate(heads):
        right = number > 0 and bool(cells) and all(re.match(r"[\d–-]|$", str(row[number])) for row in cells)
        table.add_column(Text(head), justify="right" if right else "left", no_wrap=True)
    for row in cells:
        table.add_row(*row)
    return table


def _print_block(console: Console, heads: Sequence[str], row: Sequence[Text]) -> None:
    console.print(Text.assemble((str(row[0]), "bold")), soft_wrap=True)
    indent = max(map(len, heads[1:]), default=0) + 4
    for head, cell in zip(heads[1:], row[1:], strict=True):
        if str(cell):
            for number, line in enumerate(str(cell).split("\n")):
                first = f"  {head.replace(chr(10), ' ')}" if number == 0 else ""
                print_wrapped(console, line, indent, first, str(cell.style) or None)
