"""Shows how far a command is: bars with rate and remaining time on a terminal, elsewhere plain lines with the time.

Elsewhere, a line comes when a step begins or ends and every so often in between, even while a step says nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.text import Text

from arriero.sizes import human_bytes

EVERY = 20.0  # seconds without a line are the most that a log stays silent for
SHORT = 1.0  # a step that takes less is told by its end alone


class Shown(Protocol):
    """One way to show progress."""

    def __call__(self, step: str, done: int, total: int, unit: str) -> None:
        """Show that `done` of `total` `unit` of `step` are behind; a total of 0 means that nobody knows."""

    def start(self) -> None:
        """Begin to show."""

    def stop(self) -> None:
        """End to show."""


class Progress:
    """A `Watch` for `Build`, and who tells its sentences; what it shows goes to `console`."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._shown: Shown = _Terminal(console) if console.is_terminal else _Lines(console)

    def __enter__(self) -> Self:
        self._shown.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._shown.stop()

    def __call__(self, step: str, done: int, total: int, unit: str) -> None:
        """See `Shown`."""
        self._shown(step, done, total, unit)

    def tell(self, sentence: str) -> None:
        """Print a sentence between."""
        self.console.print(escape(sentence), highlight=False, soft_wrap=True)


class _Rate(ProgressColumn):
    """Units per second, and how long the rest takes at that rate."""

    def render(self, task: Task) -> Text:
        if task.finished or not task.speed or task.total is None:
            return Text("")
        left = (task.total - task.completed) / task.speed
        return Text(f"{_rate(task.speed, task.fields['unit'])}, {_clock(left)} left", "dim")


class _Terminal:
    """Each step gets a bar, which stays with its time when the step is over."""

    def __init__(self, console: Console) -> None:
        columns = (
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            TextColumn("{task.fields[amount]}"),
            TimeElapsedColumn(),
            _Rate(),
        )
        self._bars = Bars(*columns, console=console)
        self._tasks: dict[str, TaskID] = {}
        self.start, self.stop = self._bars.start, self._bars.stop

    def __call__(self, step: str, done: int, total: int, unit: str) -> None:
        if step not in self._tasks:
            for task in self._bars.tasks:
                if not task.finished:  # a step of unknown length is over when the next one starts
                    self._bars.update(task.id, total=task.completed or 1, completed=task.completed or 1)
            self._tasks[step] = self._bars.add_task(escape(step), total=total or None, amount="", unit=unit)
        self._bars.update(
            self._tasks[step], completed=done, total=total or None, amount=_amount(done, total, unit) if total else ""
        )


class _Lines:
    """Plain lines for logs."""

    def __init__(self, console: Console, every: float = EVERY, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._every, self._clock = console, every, clock
        self._lock = threading.Lock()
        self._step: str | None = None
        self._begun = self._told = self._start = clock()
        self._first = 0  # units that were done when the step began here
        self._state = (0, 0, "")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep_telling, name="progress", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()
        with self._lock:
            self._end_step()

    def __call__(self, step: str, done: int, total: int, unit: str) -> None:
        with self._lock:
            if step != self._step:
                self._end_step()
                self._step, self._begun, self._first = step, self._clock(), done
            self._state = (done, total, unit)
            self._tell_if_due()

    def _keep_telling(self) -> None:
        while not self._over.wait(SHORT):
            with self._lock:
                self._tell_if_due()

    def _tell_if_due(self) -> None:
        now = self._clock()
        if self._step is not None and now - self._told >= self._every:
            done, total, unit = self._state
            rate = (done - self._first) / max(now - self._begun, 1e-9)
            left = f", {_rate(rate, unit)}, about {_clock((total - done) / rate)} left" if total and rate > 0 else ""
            amount = f"{_amount(done, total, unit)}{left}" if total else f"at work for {_clock(now - self._begun)}"
            self._print(f"{self._step}: {amount}")

    def _end_step(self) -> None:
        """One line for the step that is over."""
        if self._step is not None:
            done, total, unit = self._state
            amount = f"{_amount(done, total, unit)} " if total else ""
            took = self._clock() - self._begun
            self._print(f"{self._step}: {amount}in {took:.1f} s")
            self._step = None

    def _print(self, line: str) -> None:
        self._told = self._clock()
        since = _clock(self._told - self._start)
        self._console.print(escape(f"[{since}] {line}"), highlight=False, soft_wrap=True)


def _amount(done: int, total: int, unit: str) -> str:
    return f"{human_bytes(done)} of {human_bytes(total)}" if unit == "bytes" else f"{done}/{total} {unit}"


def _rate(speed: float, unit: str) -> str:
    return f"{human_bytes(speed)}/s" if unit == "bytes" else f"{speed:.3g} {unit}/s"


def _clock(seconds: float) -> str:
    whole = round(seconds)
    hours = f"{whole // 3600}:" if whole >= 3600 else ""
    return f"{hours}{whole // 60 % 60:02}:{whole % 60:02}"
