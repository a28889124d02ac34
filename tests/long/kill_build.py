"""Kills a build at many seeded moments over all of its stages, goes on, and compares the final bytes but for times.

A moment is the n-th time that the build opens, renames or deletes something under its output or in the user's cache, so
that short stages and publishing are struck as often as long ones; of a named model it is a time, so that long work is
struck where it is. Several kills strike one output before it is built to the end; every fourth output begins with an
empty cache, the others take from it what earlier ones made.

    python -m tests.long.kill_build FOLDER --kills 100
    python -m tests.long.kill_build FOLDER --kills 20 --model 'synthetic://scout?layers=1'
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arriero.profiles.recipe import shipped
from arriero.runtimes.user_cache import VARIABLE, user_cache
from tests.command import contents, write_build
from tests.small import small_scout

# Runs the command and kills it at event number argv[2] under the folders argv[1]; otherwise prints how many there were.
CHILD = """
import os, signal, sys
folders, last, count = tuple(sys.argv[1].split(os.pathsep)), int(sys.argv[2]), 0

def struck(event, values):
    global count
    if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "shutil.rmtree"):
        if any(isinstance(value, (str, os.PathLike)) and os.fspath(value).startswith(folders) for value in values):
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(struck)
sys.argv = ["arriero", "build", sys.argv[3]]
from arriero.export.__main__ import main
try:
    main()
finally:
    print("events", count)
"""
TIMED = ("measured", "chain")  # of a manifest: what times go into
EMPTIED = 4  # outputs until the cache is emptied again
PAGE, REPORT = "parity.html", "parity.json"  # say when they were made


class KillingFailed(Exception):
    """A build that was killed did not end as an undisturbed one does."""


def prepare(folder: Path) -> Path:
    """A build of a small model with and without calibration, so that there is a stage of every kind."""
    small_scout(folder / "scout")
    text = shipped()["int4"].read_text().replace("block: 64", "block: 32").replace("name: int4", "name: small4")
    text = text.replace("kl_over_rtn: 0.5", "kl_over_rtn: 0.99").replace("task_accuracy_drop: 0.02", "")
    (folder / "small4.yaml").write_text(text)
    profiles = ("fp32", str(folder / "small4.yaml"))
    file = write_build(folder / "build.yaml", folder / "scout", profiles=profiles, samples=4, answers="generated")
    file.write_text(file.read_text().replace("calibration: {samples: 4", "calibration: {samples: 40"))
    return file


def prepare_named(folder: Path, model: str) -> Path:
    """A build of `model` for TVM in int8, whose stages take their time at a real size."""
    return write_build(folder / "build.yaml", model, "text", ("int8",), samples=4, backend="tvm")


def build(file: Path, last: int = 0, seconds: float | None = None) -> subprocess.CompletedProcess[str]:
    """Run the build until event number `last`, 0 for to its end, or for so many seconds."""
    folders = f"{file.parent / 'bundles'}{os.pathsep}{user_cache()}"
    command = [sys.executable, "-c", CHILD, folders, str(last), file]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as late:  # `run` has killed it
        return subprocess.CompletedProcess(late.cmd, -signal.SIGKILL, "", "")


def ended(done: subprocess.CompletedProcess[str]) -> int:
    """How many events a build had that ended by itself. Raises KillingFailed for one that did not end well."""
    if done.returncode:
        raise KillingFailed(f"the build ended with code {done.returncode}:\n{done.stdout}{done.stderr}")
    return int(done.stdout.rsplit("events ", 1)[1])


def result(output: Path) -> dict[str, Any]:
    """All that lies in an output folder, published or not, without what tells times."""
    made: dict[str, Any] = contents(output)
    for name in [*made]:
        if name.endswith((f"/{PAGE}", "/stage.json")) or name in (".work/lock", ".work/hashes.jsonl"):
            made[name] = "there"
        elif name.endswith(f"/{REPORT}"):
            report = json.loads((output / name).read_text())
            del report["labels"]["measured"]
            made[name] = report
        elif name.endswith("/manifest.json"):
            entries = json.loads((output / name).read_text())
            for report in (PAGE, REPORT):
                entries["files"].pop(report, None)
            made[name] = {key: value for key, value in entries.items() if key not in TIMED}
    return made


def under_way(output: Path) -> str:
    """What was being made when the build was killed."""
    halves = sorted(path.name for path in (output / ".work").glob("*.partial") if path.is_dir())
    if halves:
        return halves[0].rpartition("-")[0]
    return "publishing" if any(output.glob("*.partial")) else "between stages"


def run(
    folder: Path,
    kills: int,
    seed: int,
    per_output: int,
    model: str | None = None,
    tell: Callable[[str], None] = print,
    own_cache: Path | None = None,
) -> Counter[str]:
    """Kill `kills` times and give how often each stage was struck. Raises KillingFailed where anything differs.

    `own_cache` is the user's cache for it alone, which is emptied on the way.
    """
    file = prepare(folder) if model is None else prepare_named(folder, model)
    drawn, struck = random.Random(seed), Counter[str]()
    output = file.parent / "bundles"
    started = time.monotonic()
    events = ended(build(file))
    seconds = time.monotonic() - started
    expected = result(output)
    tell(f"an undisturbed build has {events} events, {len(expected)} files and takes {seconds:.0f} s")
    outputs = itertools.count()
    while sum(struck.values()) < kills:
        shutil.rmtree(output)
        if own_cache is not None and next(outputs) % EMPTIED == 0:
            shutil.rmtree(own_cache)
        moments = list[float]()
        for _ in range(min(per_output, kills - sum(struck.values()))):
            if model is None:
                moments.append(drawn.randint(1, events))
                done = build(file, last=moments[-1])
            else:
                moments.append(round(drawn.uniform(0, seconds), 1))
                done = build(file, seconds=moments[-1])
            if done.returncode != -signal.SIGKILL:
                ended(done)  # what was left had fewer events
                break
            struck[under_way(output)] += 1
        ended(build(file))
        made = result(output)
        different = sorted(name for name in {*made, *expected} if made.get(name) != expected.get(name))
        if different:
            raise KillingFailed(f"killed at {moments}: {', '.join(different)}")
        tell(f"{sum(struck.values())} kills, the last at {moments}: equal bytes")
    return struck


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a new folder for the model and its builds")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--per-output", type=int, default=4, help="kills before a build is left to end")
    parser.add_argument("--model", help="what to build in place of a small model that is written")
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    folder = options.folder.absolute()
    os.environ[VARIABLE] = str(folder / "cache")
    struck = run(folder, options.kills, options.seed, options.per_output, options.model, own_cache=folder / "cache")
    for stage, count in sorted(struck.items()):
        print(f"{count:4} in {stage}")


if __name__ == "__main__":
    main()
