"""The memory that a stage of a build holds: measured from its beginning to its end, and kept below a limit."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import ClassVar

from arriero.errors import ArrieroError
from arriero.runtimes.cgroup import read_text
from arriero.runtimes.memory import anonymous_memory, status_bytes
from arriero.sizes import human_bytes

SPARE = 1.25  # a budget is proposed with this much above what was reached
LOOKS = 5  # samples between two looks for programs that this one runs, which cost more than their memory


class _Stopped(BaseException):
    """What ends a stage that passes its limit; no handler of ordinary errors takes it for one."""


class MemoryWatch:
    """Measures what runs inside `with`, in bytes: anonymous memory at its `start` and at its `peak`, and `resident`.

    Anonymous memory (sampled RssAnon) counts the programs that this one runs, compilers for instance, too. Mapped
    weight files count in `resident` (VmHWM) alone; the kernel takes them back when memory is short. `resident` is the
    peak since the process began, because the kernel keeps one mark only.

    What a job of the work held in another process counts too, by `note`.

    With a `limit`, work that holds more anonymous memory is stopped as soon as Python has its turn, and `__exit__`
    raises `ArrieroError` with a budget that would have done so far.
    """

    _at_work: ClassVar[list[MemoryWatch]] = []

    def __init__(self, limit: int | None = None, doing: str = "this", interval: float = 0.02) -> None:
        """Watch what is called `doing` every `interval` seconds."""
        self.start = self.peak = self.resident = 0
        self._limit, self._doing, self._interval = limit, doing, interval
        self._worker = threading.get_ident()
        self._samples, self._programs = 0, list[Path]()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-watch", daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._sample()
        self.start = self.peak
        self._thread.start()
        self._at_work.append(self)
        return self

    @classmethod
    def note(cls, peak: int) -> None:
        """Let the work that is watched have held `peak` bytes, in another process."""
        for watch in cls._at_work:
            watch.peak = max(watch.peak, peak)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._at_work.remove(self)
        self._end.set()
        self._thread.join()
        self._sample()
        if self._over:
            _raise_in(self._worker, None)  # what has not arrived yet
            if kind is None or kind is _Stopped:
                raise self._refusal() from None

    @property
    def _over(self) -> bool:
        return self._limit is not None and self.peak > self._limit

    def _watch(self) -> None:
        while not self._end.wait(self._interval):
            self._sample()
            if self._over:
                _raise_in(self._worker, _Stopped)
                return

    def _sample(self) -> None:
        own = Path("/proc/self")
        if self._samples % LOOKS == 0:
            # a child that has not become another program yet shares this one's memory
            name = read_text(own / "cmdline")
            self._programs = [folder for folder in _descendants(own) if read_text(folder / "cmdline") != name]
        self._samples += 1
        held, resident = status_bytes(own, "RssAnon", "VmHWM")
        self.peak = max(self.peak, held + sum(map(anonymous_memory, self._programs)))
        self.resident = max(self.resident, resident)

    def _refusal(self) -> ArrieroError:
        assert self._limit is not None
        return ArrieroError(
            f"{self._doing} held {human_bytes(self.peak)} of memory and was stopped",
            where="budgets.host_memory",
            expected=f"at most {human_bytes(self._limit)}",
            remedy=f"Raise it to {human_bytes(SPARE * self.peak)} and run the same command again: the build goes on "
            "where it stopped",
        )


def release_memory() -> None:
    """Give memory that is no longer used back to the system: what follows is not to pay for what went before."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim is not None:
        trim(0)


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Let `error` be raised in a thread at its next step in Python; None takes back what was not raised yet."""
    value = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), value)


def _descendants(folder: Path) -> Iterator[Path]:
    """The processes that a process started, and those that they did."""
    for task in folder.glob("task/*/children"):
        for child in read_text(task).split():
            yield Path("/proc") / child
            yield from _descendants(Path("/proc") / child)
