"""Shows a parity report on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from arriero.export.cli.tables import print_rows, print_wrapped
from arriero.runtimes.proof.pages import show, show_limit, shown_rows

if TYPE_CHECKING:
    from rich.console import Console

    from arriero.runtimes.proof.report import ParityReport

MARKS = {"pass": ("pass", "green"), "fail": ("FAIL", "bold red"), "info": ("info", "dim")}


def show_parity(report: ParityReport, console: Console) -> None:
    """Print the rows, failures last, where the eye ends, then one line that says whether it passed."""
    rows, blocks = [], []
    for row in sorted(shown_rows(report), key=lambda row: row.status == "fail"):
        (word, style), limit = MARKS[row.status], show_limit(row)
        rows.append((row.title, show(row), limit, Text(word, style), Text(row.detail, "dim")))
        judged = ", ".join(filter(None, (show(row), limit, word)))
        blocks.append((row.title, Text(judged, "" if row.status == "info" else style), Text(row.detail, "dim")))
    heads = ("metric", "value", "threshold", "status", "detail")
    print_rows(console, heads, rows, blocks=(("metric", "value", "detail"), blocks))
    for warning in report.warnings:
        print_wrapped(console, warning, 9, "warning:", "yellow")
    judged_rows = sum(row.status != "info" for row in report.rows)
    if report.failed:
        console.print(Text(f"{len(report.failed)} of {judged_rows} judged rows failed", "bold red"))
    else:
        console.print(Text(f"all {judged_rows} judged rows passed", "bold green"))
