"""Shows bundles side by side on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from arriero.export.cli.tables import print_rows, print_wrapped
from arriero.export.proof.compare import HEADS, NOTES, Compared, cells

if TYPE_CHECKING:
    from rich.console import Console


def show_comparison(lines: Sequence[Compared], console: Console) -> None:
    """Print one column per bundle where they fit, else one block per bundle; then what the figures are."""
    columns = [cells(line) for line in lines]
    rows = [(head, *(column[number] for column in columns)) for number, head in enumerate(HEADS)]
    print_rows(console, rows[0], rows[1:], blocks=(HEADS, columns))
    for note in NOTES:
        print_wrapped(console, note, style="dim")
