"""Progress in a log: lines with the time, rate and what is left, and never silence for minutes."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from arriero.export.cli import progress
from arriero.export.cli.progress import Progress


class Clock:
    """A time that only the test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def lines(console: Console) -> list[str]:
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text.splitlines()


def test_a_log_gets_a_line_every_so_often_and_one_per_step() -> None:
    console, clock = Console(file=io.StringIO(), width=40), Clock()
    shown = progress._Lines(console, every=20.0, clock=clock)
    for second in range(101):
        clock.now = float(second)
        shown("calibrate: layer 3 (4 of 48)", second, 200, "samples")
    clock.now = 110.0
    shown("write weights [/x]", 0, 4 << 20, "bytes")
    clock.now = 131.0
    shown("write weights [/x]", 1 << 20, 4 << 20, "bytes")
    step = "calibrate: layer 3 (4 of 48)"
    assert lines(console) == [
        f"[00:20] {step}: 20/200 samples, 1 samples/s, about 03:00 left",
        f"[00:40] {step}: 40/200 samples, 1 samples/s, about 02:40 left",
        f"[01:00] {step}: 60/200 samples, 1 samples/s, about 02:20 left",
        f"[01:20] {step}: 80/200 samples, 1 samples/s, about 02:00 left",
        f"[01:40] {step}: 100/200 samples, 1 samples/s, about 01:40 left",
        f"[01:50] {step}: 100/200 samples in 110.0 s",
        "[02:11] write weights [/x]: 1 MiB of 4 MiB, 48.8 KiB/s, about 01:03 left",
    ]


def test_a_step_that_says_nothing_is_told_of_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SHORT", 0.01)
    console = Console(file=io.StringIO(), width=80)
    with Progress(console) as watch:
        shown = watch._shown
        assert isinstance(shown, progress._Lines)
        shown._every = 0.05
        watch("compile", 0, 0, "")
        deadline = time.monotonic() + 10
        while not any("compile: at work for" in line for line in lines(console)) and time.monotonic() < deadline:
            time.sleep(0.01)
        watch.tell("40 of 64 experts [/x]")
    assert any("compile: at work for" in line for line in lines(console))
    assert "40 of 64 experts [/x]" in lines(console)
    assert "compile: in " in lines(console)[-1]


def test_a_terminal_gets_bars_with_rate_and_time_left() -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    with Progress(console) as watch:
        for done in range(40):
            watch("prove [/x]", done, 40, "samples")
            time.sleep(0.005)
        watch("compile", 0, 0, "")
        watch("done", 1, 1, "bundles")
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    for words in ("prove [/x]", "samples/s", "left", "compile"):
        assert words in text
