"""What a stage holds of memory is measured, and it is stopped beyond a limit."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest

from arriero.errors import ArrieroError
from arriero.export.machine.memory_watch import MemoryWatch, release_memory


def test_the_watch_sees_what_was_given_back():
    with MemoryWatch(interval=0.005) as before:
        pass
    with MemoryWatch(interval=0.005) as peak:
        block = np.ones(64 << 20, np.uint8)
        time.sleep(0.1)
        del block
    assert peak.peak - before.peak > 48 << 20
    assert peak.resident >= peak.peak


def test_the_programs_that_a_stage_runs_count_in_its_peak():
    script = "import time; held = bytearray(150 << 20); time.sleep(1)"
    with MemoryWatch() as alone:
        pass
    with MemoryWatch() as memory:
        subprocess.run(["sh", "-c", f"{sys.executable} -c '{script}'; true"], check=True)
    assert memory.peak - alone.peak > 150 << 20


def test_memory_that_was_let_go_is_given_back():
    held = [bytearray(100_000) for _ in range(1000)]  # small enough to come from the heap
    last = bytearray(100)
    with MemoryWatch() as before:
        pass
    del held
    release_memory()
    with MemoryWatch() as after:
        pass
    assert before.peak - after.peak > 80_000_000
    assert last is not None


def hoard(held: list[np.ndarray]) -> None:
    """Take 10 GB in all, a MiB each millisecond."""
    for _ in range(10_000):
        held.append(np.ones(1 << 20, np.uint8))
        time.sleep(0.001)


def test_beyond_the_limit_the_work_is_stopped_and_told_a_budget_that_would_do() -> None:
    with MemoryWatch() as before:
        pass
    limit = before.peak + (64 << 20)
    held: list[np.ndarray] = []
    with pytest.raises(ArrieroError) as caught, MemoryWatch(limit, "stage lower-x", interval=0.001) as watch:
        hoard(held)
    assert 32 < len(held) < 256  # what else the process holds grows and shrinks a little
    assert watch.peak < limit + (96 << 20)
    assert str(caught.value).startswith("budgets.host_memory: stage lower-x held ")
    assert "expected at most " in str(caught.value)
    for _ in range(100):  # nothing of it arrives later
        time.sleep(0.001)


def test_what_fails_below_the_limit_fails_as_it_does() -> None:
    with pytest.raises(ZeroDivisionError), MemoryWatch(1 << 50):
        _ = 1 // 0


def test_what_ends_above_the_limit_is_refused_all_the_same() -> None:
    with pytest.raises(ArrieroError, match="this held"), MemoryWatch(1 << 20, interval=60):
        pass
