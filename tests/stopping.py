"""Commands killed on the way, and what they had finished by then."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

COMMAND = [sys.executable, "-m", "arriero.export"]
# A piece of a script that has os, signal and sys: argv[2] calls of what is `counted` are let through, the next kills.
COUNTED = """
left = int(sys.argv[2])
def counted(function):
    def call(*arguments, **options):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return function(*arguments, **options)
    return call
"""


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """A process started within the block can be interrupted, even where this one was told to ignore Ctrl-C.

    A background shell, nohup and some CI systems start their children so. What a program handles is at its default in
    the programs that it starts; what it ignores stays ignored.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def stages(output: Path) -> dict[str, int]:
    """The finished stages by name, with the time at which each was finished."""
    records = (output / ".work").glob("*/stage.json")
    return {r.parent.name: r.stat().st_mtime_ns for r in records if not r.parent.name.endswith(".partial")}


def run_and_kill(build_file: Path, started: str, verb: str = "build") -> None:
    """Give the command, and kill it as soon as something in the work folder that matches `started` is there."""
    work = build_file.parent / "bundles" / ".work"
    process = subprocess.Popen([*COMMAND, verb, str(build_file)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    with process:
        while process.poll() is None and not list(work.glob(started)):
            time.sleep(0.002)
        assert process.poll() is None, f"it ended before {started} appeared: {process.stderr.read().decode()}"
        process.send_signal(signal.SIGKILL)
