"""Shows how far a command is: on a terminal what runs now, elsewhere plain lines with the time.

A step that is over becomes one line. Elsewhere a line also comes every so often, even while a step says nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from arriero.sizes import human_bytes

EVERY = 20.0  # seconds without a line are the most that a log stays silent for
SHORT = 1.0  # a step that takes less is told by its end alone
BAR = 10  # characters
INDENT = 2
Clock = Callable[[], float]


class Shown(Protocol):
    """One way to show progress."""

    def __call__(self, step: str, done: int, total: int, unit: str) -> None:
        """Show that `done` of `total` `unit` of `step` are behind; a total of 0 means that nobody knows."""

    def start(self) -> None:
        """Begin to show."""

    def stop(self, well: bool) -> None:
        """End to show; `well` says whether the last step ended by itself."""


class Progress:
    """A `Watch` for `Build`, and who tells its sentences; what it shows goes to `console`."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._shown: Shown = _Terminal(console) if console.is_terminal else _Lines(console)

    def __enter__(self) -> Self:
        self._shown.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._shown.stop(kind is None)

    def __call__(self, step: str, done: int, total: int, unit: str) -> None:
        """See `Shown`."""
        self._shown(step, done, total, unit)

    def tell(self, sentence: str) -> None:
        """Print a sentence between."""
        self.console.print(escape(sentence), highlight=False, soft_wrap=True)


@dataclass
class _Step:
    """What runs, and how far it is."""

    name: str
    begun: float
    first: int  # units that were done when it began here
    done: int
    total: int
    unit: str
    moved: float  # when a unit was last done

    def move(self, done: int, total: int, unit: str, now: float) -> None:
        """Take up what is said of the same step."""
        if done != self.done:
            self.moved = now
        self.done, self.total, self.unit = done, total, unit

    @property
    def amount(self) -> str:
        """How much is done of how much; empty where nobody knows."""
        if not self.total:
            return ""
        if self.unit == "bytes":
            return f"{human_bytes(self.done)} of {human_bytes(self.total)}"
        return f"{self.done}/{self.total} {self.unit}"

    @property
    def all_done(self) -> bool:
        """Whether its last unit is behind."""
        return 0 < self.total <= self.done

    def figures(self, now: float) -> list[str]:
        """How far it is, how fast, and how long the rest takes; where nobody knows, for how long it is at work."""
        rate = (self.done - self.first) / max(now - self.begun, 1e-9)
        if self.all_done:
            return [self.amount, f"finishing for {_clock(now - self.moved)}"]
        if not self.total or rate <= 0:
            return [*[self.amount] * bool(self.total), f"at work for {_clock(now - self.begun)}"]
        return [self.amount, _rate(rate, self.unit), f"about {_clock((self.total - self.done) / rate)} left"]

    def end(self, now: float, well: bool) -> str:
        """The line that stays of it."""
        took = f"{'in' if well else 'stopped after'} {now - self.begun:.1f} s"
        return f"{self.name}: {self.amount}{' ' * bool(self.amount)}{took}"


class _Terminal:
    """What runs is shown at the foot: a line with a bar, and its figures below; what is over stands above."""

    def __init__(self, console: Console, clock: Clock = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._step: _Step | None = None
        self._spinner = Spinner("dots")
        self._live = Live(self, console=console, refresh_per_second=10, transient=True)
        self.start = self._live.start

    def stop(self, well: bool) -> None:
        self._live.stop()
        if self._step is not None:
            self._end(self._step, well)

    def __call__(self, step: str, done: int, total: int, unit: str) -> None:
        now, before = self._clock(), self._step
        if before is None or step != before.name:
            self._step = _Step(step, now, done, done, total, unit, now)
            if before is not None:
                self._end(before, True)
        else:
            before.move(done, total, unit, now)

    def _end(self, step: _Step, well: bool) -> None:
        mark = ("✓ ", "green") if well else ("· ", "yellow")
        self._console.print(Text.assemble(mark, step.end(self._clock(), well)), soft_wrap=True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        step, now = self._step, self._clock()
        if step is None:
            return
        name = Text(step.name)
        name.truncate(options.max_width - BAR - INDENT - 1, overflow="ellipsis")
        bar = ProgressBar(step.total or None, step.done, BAR, pulse=not step.total, animation_time=now)
        line = Table.grid(padding=(0, 1, 0, 0), pad_edge=False)
        line.add_row(self._spinner, name, bar)
        yield line
        figures, room = step.figures(now), options.max_width - INDENT
        while cell_len(", ".join(figures)) > room and len(figures) > 1:
            figures.pop(-2)  # the rate goes before the amount
        yield Text(f"{' ' * INDENT}{', '.join(figures)}", "dim", no_wrap=True, overflow="ellipsis")


class _Lines:
    """Plain lines for logs."""

    def __init__(self, console: Console, every: float = EVERY, clock: Clock = time.monotonic) -> None:
        self._console, self._every, self._clock = console, every, clock
        self._lock = threading.Lock()
        self._step: _Step | None = None
        self._told = self._start = clock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep_telling, name="progress", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, well: bool) -> None:
        self._over.set()
        self._thread.join()
        with self._lock:
            self._end_step(well)

    def __call__(self, step: str, done: int, total: int, unit: str) -> None:
        with self._lock:
            now = self._clock()
            if self._step is None or step != self._step.name:
                self._end_step()
                self._step = _Step(step, now, done, done, total, unit, now)
            self._step.move(done, total, unit, now)
            self._tell_if_due()

    def _keep_telling(self) -> None:
        while not self._over.wait(SHORT):
            with self._lock:
                self._tell_if_due()

    def _tell_if_due(self) -> None:
        now = self._clock()
        if self._step is not None and now - self._told >= self._every:
            self._print(f"{self._step.name}: {', '.join(self._step.figures(now))}")

    def _end_step(self, well: bool = True) -> None:
        """One line for the step that is over."""
        if self._step is not None:
            self._print(self._step.end(self._clock(), well))
            self._step = None

    def _print(self, line: str) -> None:
        self._told = self._clock()
        since = _clock(self._told - self._start)
        self._console.print(escape(f"[{since}] {line}"), highlight=False, soft_wrap=True)


def _rate(speed: float, unit: str) -> str:
    if unit == "bytes":
        return f"{human_bytes(speed)}/s"
    return f"{speed:,.0f} {unit}/s" if speed >= 100 else f"{speed:.3g} {unit}/s"


def _clock(seconds: float) -> str:
    whole = round(seconds)
    hours = f"{whole // 3600}:" if whole >= 3600 else ""
    return f"{hours}{whole // 60 % 60:02}:{whole % 60:02}"
