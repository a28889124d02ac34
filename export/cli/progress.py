"""Shows a build's progress on a terminal: a bar with bytes or counts, rate and remaining time for every long step."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from arriero.export.machine.budget import human_bytes


class ProgressBars:
    """A `Watch` for `Build`; each step gets a line, which stays with its time when the step is over."""

    def __init__(self, console: Console) -> None:
        columns = (
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[amount]}"),
            TimeElapsedColumn(),
        )
        self._progress = Progress(*columns, console=console)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.stop()

    def __call__(self, step: str, done: int, total: int, unit: str) -> None:
        """Show that `done` of `total` `unit` of `step` are behind; a total of 0 means that nobody knows."""
        if step not in self._tasks:
            for task in self._progress.tasks:
                if not task.finished:  # a step of unknown length is over when the next one starts
                    self._progress.update(task.id, total=task.completed or 1, completed=task.completed or 1)
            self._tasks[step] = self._progress.add_task(step, total=total or None, amount="")
        amount = f"{human_bytes(done)} of {human_bytes(total)}" if unit == "bytes" else f"{done}/{total} {unit}"
        self._progress.update(self._tasks[step], completed=done, total=total or None, amount=amount if total else "")
