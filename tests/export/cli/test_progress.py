"""Progress: in a log never silence for minutes, in a terminal what runs, whatever its size."""

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


def test_a_log_says_for_how_long_a_step_without_a_rate_is_at_work() -> None:
    console, clock = Console(file=io.StringIO(), width=40), Clock()
    shown = progress._Lines(console, every=20.0, clock=clock)
    for second, step in (
        (0, (0, 1, "kernels")),
        (40, (0, 1, "kernels")),
        (50, (1, 1, "kernels")),
        (90, (1, 1, "kernels")),
    ):
        clock.now = float(second)
        shown("compile", *step)
    assert lines(console) == [
        "[00:40] compile: 0/1 kernels, at work for 00:40",
        "[01:30] compile: 1/1 kernels, finishing for 00:40",
    ]


@pytest.mark.parametrize("terminal", [False, True])
def test_a_step_that_an_error_ends_is_not_told_as_done(terminal: bool) -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=terminal, color_system=None)
    watch = Progress(console).__enter__()
    watch("load", 1, 1, "graphs")
    watch("compile", 1, 3, "graphs")
    watch.__exit__(ValueError, ValueError(), None)
    assert "compile: 1/3 graphs stopped after " in lines(console)[-1]
    assert "\u2713" not in lines(console)[-1]


STEPS = (
    ("hash checkpoint", 60 << 30, "bytes"),
    ("reference record: layer 13 (14 of 48)", 2160, "cases and experts"),
    ("maverick-int4-rpi5: measure the RTN baseline [/x]", 2000, "samples"),
)


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize(("step", "total", "unit"), STEPS)
def test_a_terminal_of_any_width_shows_step_amount_and_time_left(step: str, total: int, unit: str, width: int) -> None:
    console, clock = Console(width=width, force_terminal=True, color_system=None, legacy_windows=False), Clock()
    shown = progress._Terminal(console, clock)
    shown(step, 0, total, unit)
    clock.now = 600.0
    shown(step, total // 4, total, unit)
    with console.capture() as captured:
        console.print(shown)
    name, figures = captured.get().splitlines()
    assert step[:40] in name
    amount = "15 GiB of 60 GiB" if unit == "bytes" else f"{total // 4}/{total} {unit}"
    assert figures.startswith(f"  {amount}, ")
    assert figures.rstrip().endswith("about 30:00 left")
    assert width < 80 or "/s, " in figures
    assert max(map(len, (name, figures))) <= width
    assert "\u2026" not in figures


def test_a_terminal_shows_what_runs_and_each_step_that_is_over_once() -> None:
    console = Console(file=io.StringIO(), width=80, height=24, force_terminal=True, color_system=None)
    with Progress(console) as watch:
        for layer in range(30):
            for done in range(3):
                watch(f"layer {layer} of 30", done, 2, "samples")
        watch("compile", 0, 0, "")
        live = Console(file=io.StringIO(), width=80)
        live.print(watch._shown)
    assert [words in line for words, line in zip(("compile", "at work for"), lines(live), strict=True)] == [True, True]
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    for layer in range(30):
        assert text.count(f"\u2713 layer {layer} of 30: 2/2 samples in ") == 1
    assert "\u2713 compile: in " in text
