"""Shows on a terminal what this machine has and lacks, and in a sentence per backend what it can do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from arriero.export.cli.tables import print_rows, print_wrapped
from arriero.traits import BUILD, RUN, install

if TYPE_CHECKING:
    from rich.console import Console

    from arriero.export.machine.doctor import Diagnosis

HEADS = ("what", "found", "status", "how to get it")


def show_diagnosis(diagnosis: Diagnosis, console: Console) -> None:
    """Print every check, those of the machine first, and the verdicts."""
    for title, checks in (("machine", diagnosis.machine), *diagnosis.backends.items()):
        rows = []
        for check in checks:
            colour = "green" if check.status == "ok" else "red" if check.needed_for else "yellow"
            rows.append((check.name, check.found, Text(check.status, colour), check.remedy or ""))
        print_rows(console, HEADS, rows, title if title == "machine" else f"backend {title}")
        console.print()
    for name in diagnosis.backends:
        can = {action: diagnosis.can(action, name) for action in (BUILD, RUN)}
        if diagnosis.is_device and can[RUN]:
            needs = ", ".join(diagnosis.lacks(BUILD, name))
            advice = install("export")
            print_wrapped(console, f"{name}: can run bundles; cannot build: needs {needs} ({advice})")
        else:
            said = ", ".join(f"{action} {'yes' if can[action] else 'no'}" for action in (BUILD, RUN))
            print_wrapped(console, f"{name}: {said}")
