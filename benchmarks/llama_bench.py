"""llama.cpp as a contender: a file of its own under its own programs, in every setting that they have for a CPU.

What a program takes stands in its `--help`; forks spell it otherwise: ik_llama.cpp repacks weights with `-rtr` and has
`-gp` for tokens decoded after others, where llama.cpp has `--repack` and `-d`.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from timed_bundle import Case

REPACK = {"--repack": ("--repack", "--no-repack"), "-rtr": ("-rtr", None)}  # of llama-bench: of llama-batched-bench
TOLD = 8  # last lines of a program that failed
BATCHED_RATE = 7  # the column of its table with the tokens per second that all rows decode together


@dataclass(frozen=True)
class Setting:
    """Whether weights are repacked as they are loaded, None where the program cannot choose, and flash attention."""

    repack: bool | None = None
    flash: bool = True

    def __str__(self) -> str:
        return (" no repack" if self.repack is False else "") + ("" if self.flash else " no flash")


class Program:
    """`llama-bench` of one build, with `llama-batched-bench` beside it for steps of several rows."""

    def __init__(self, path: Path) -> None:
        self.path = Path(shutil.which(path) or path).absolute()
        shown = subprocess.run([self.path, "--help"], capture_output=True, text=True)
        self.help = shown.stdout + shown.stderr  # some end it as an error
        self.repack = next((option for option in REPACK if re.search(f"{option}[ ,]", self.help)), None)

    def settings(self, every: bool) -> Iterator[Setting]:
        """What it is to be timed with: `every` setting that it knows, or the one in which it does what it can."""
        known = (None,) if self.repack is None else (True, False)
        for repack, flash in itertools.product(known if every else known[:1], (True, False) if every else (True,)):
            yield Setting(repack, flash)

    def bench(self, setting: Setting, case: Case) -> list[str]:
        """The arguments of `llama-bench` for a case of one row."""
        options = ["-fa", str(int(setting.flash)), "-o", "json", "-r", "1"]
        if self.repack is not None:
            options += [self.repack, str(int(bool(setting.repack)))]
        if case.kind == "prefill":
            return [*options, "-p", str(case.tokens), "-n", "0"]
        if case.depth and "-gp " in self.help:
            return [*options, "-p", "0", "-n", "0", "-gp", f"{case.depth},{case.tokens}"]
        return [*options, "-p", "0", "-n", str(case.tokens), *(["-d", str(case.depth)] if case.depth else [])]

    def batched(self, setting: Setting, case: Case) -> list[str]:
        """The arguments of `llama-batched-bench` for a case of several rows."""
        before = max(case.depth, 1)
        tokens = ["-npp", str(before), "-ntg", str(case.tokens), "-npl", str(case.rows)]
        tokens += ["-c", str(case.rows * (before + case.tokens)), "-fa", "on" if setting.flash else "off"]
        flag = None if self.repack is None else REPACK[self.repack][0 if setting.repack else 1]
        return [*tokens, *([] if flag is None else [flag])]


class LlamaCpp:
    """A GGUF file under a program in one setting, one process per question."""

    def __init__(self, program: Program, gguf: Path, threads: int, setting: Setting) -> None:
        self.program, self.setting = program, setting
        self.common = ["-m", str(gguf.absolute()), "-t", str(threads)]

    def measure(self, case: Case) -> float:
        """Tokens per second; NaN where the program fails, which is told with what it said."""
        path, program = self.program.path, self.program
        if case.rows > 1:
            path = path.with_name("llama-batched-bench")
            options = program.batched(self.setting, case)
        else:
            options = program.bench(self.setting, case)
        command = [str(path), *self.common, *options]
        with tempfile.TemporaryDirectory() as folder:  # where ik_llama.cpp leaves its log
            done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        rate = None
        if not done.returncode:
            rate = batched_rate(done.stdout + done.stderr) if case.rows > 1 else rate_of_run(done.stdout)
        if rate is None:
            last = done.stderr.strip().splitlines()[-TOLD:]
            print(f"{' '.join(command)} ended with {done.returncode}:", *last, sep="\n", file=sys.stderr)
        return math.nan if rate is None else rate


def rate_of_run(shown: str) -> float | None:
    """The tokens per second of the one run that `llama-bench` shows as JSON, whatever it says before; None of none."""
    _, opening, rest = shown.partition("[\n")
    runs = json.loads(opening + rest) if opening else []
    return float(runs[0]["avg_ts"]) if runs else None


def batched_rate(shown: str) -> float | None:
    """Those of the one line of figures in the table of `llama-batched-bench`, for decode; None where it has none."""
    rows = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in shown.splitlines() if "|" in line]
    figures = [row for row in rows if row[0].isdigit()]
    return float(figures[0][BATCHED_RATE]) if figures else None
