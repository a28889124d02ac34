"""What is timed side by side: contenders with names, each in a process of its own, asked in turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def named(texts: Iterable[str]) -> Iterator[tuple[str, Path]]:
    """Name and path of each `NAME=PATH`."""
    for text in texts:
        name, _, path = text.partition("=")
        yield name, Path(path)


def in_turn(names: Iterable[str], number: int) -> list[str]:
    """The `names` in the order of round `number`: each begins in its turn."""
    listed = list(names)
    first = number % len(listed)
    return listed[first:] + listed[:first]


def read_anew(path: Path) -> None:
    """Have the system forget what it holds of the files under `path`, and read them in one go."""
    for file in [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file()):
        with file.open("rb", buffering=0) as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while opened.read(1 << 24):
                pass


class Worker:
    """A script in a process that answers a line of JSON with another; `ready` is its first line, without a question."""

    def __init__(self, script: str, *arguments: str) -> None:
        command = [sys.executable, script, *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ready = self._answer()

    def ask(self, question: Any) -> Any:
        """What it answers. Raises SystemExit where it has ended."""
        print(json.dumps(question), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise SystemExit(f"the worker of {self.process.args} ended")
        return json.loads(line)
