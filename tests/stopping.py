"""Commands killed on the way, and what they had finished by then."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

COMMAND = [sys.executable, "-m", "arriero.export"]


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
