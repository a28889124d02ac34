"""What a process keeps of bundles that it loaded and closed, and of threads that asked and ended: nothing, it should.

    python benchmarks/soak.py bundles/portable-int8 bundles/pi-int8
    python benchmarks/soak.py bundles/portable-int8 --reloads 20 --callers 50

Each bundle is soaked in a process of its own: loaded, asked and closed again and again, then asked by one short-lived
thread after another. Memory (anonymous and shared), threads, open files and mappings are read along the way. What is
there after the first fifth may be caches that fill once; the exit code is 1 where anything grows from there to the end
by more than its limit.

The C library's allocator runs with one arena and gives blocks of 64 KiB and more back when they are freed. Left to its
own ways it keeps free memory in an arena per thread, more after one load and less after another, while what is in use
(`malloc_info`) stays the same.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from arriero.export.machine.memory_watch import release_memory

# Growth from the first fifth to the end. At any time one caller and its like may be ending.
LIMITS = {"memory_mib": 3.0, "threads": 0, "most_threads": 2, "files": 0, "mappings": 24}
PROMPT = "What is 17 + 25?"
# glibc's: what it keeps free for later would hide a leak of its size, and look like one.
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
SETTLE_S = 20.0  # how long threads that are done may take to end, on a machine that is busy


def read_state() -> dict[str, float]:
    """What this process holds now: MiB that are its own, threads, open files, mappings."""
    release_memory()  # what is free, but kept for later, tells nothing
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    kib = sum(int(status[name].split()[0]) for name in ("RssAnon", "RssShmem"))
    return {
        "memory_mib": kib / 1024,
        "threads": count_threads(),
        "files": len(os.listdir("/proc/self/fd")),
        "mappings": len(Path("/proc/self/maps").read_text().splitlines()),
    }


def count_threads() -> int:
    """The system's threads of this process."""
    return len(os.listdir("/proc/self/task"))


def settled(threads: float) -> dict[str, float]:
    """The state once no more than `threads` are left, or after `SETTLE_S`: the system ends a thread in its own time."""
    end = time.monotonic() + SETTLE_S
    while (state := read_state())["threads"] > threads and time.monotonic() < end:
        time.sleep(0.05)
    return state


def repeat(count: int, once: Callable[[], None]) -> tuple[dict[str, float], dict[str, float]]:
    """Do `once` so many times; gives the state after the first fifth, and that at the end."""
    early = max(count // 5, 1)
    for _ in range(early):
        once()
    time.sleep(1)
    first = read_state()
    most = first["most_threads"] = first["threads"]
    for _ in range(count - early):
        once()
        most = max(most, count_threads())
    return first, settled(first["threads"]) | {"most_threads": most}


def soak(bundle: Path, threads: int, reloads: int, callers: int) -> dict[str, dict[str, dict[str, float]]]:
    """Both parts of the soak over one bundle, in this process."""
    from arriero import load

    def reload() -> None:
        with load(bundle, threads) as session:
            pictures = [] if session.spec.vision is None else [np.full((32, 32, 3), 128, np.uint8)]
            session.generate(PROMPT, pictures, max_tokens=2)

    def call() -> None:
        caller = threading.Thread(target=lambda: session.generate(PROMPT, max_tokens=2))
        caller.start()
        caller.join()

    parts = {}
    parts[f"{reloads} reloads"] = repeat(reloads, reload)
    with load(bundle, threads) as session:
        parts[f"{callers} callers"] = repeat(callers, call)
    return {name: {"early": early, "end": end} for name, (early, end) in parts.items()}


def grown(part: dict[str, dict[str, float]]) -> list[str]:
    """What of a part grew by more than its limit, as sentences."""
    return [
        f"{name} grew from {part['early'][name]:.0f} to {part['end'][name]:.0f}"
        for name, limit in LIMITS.items()
        if part["end"][name] - part["early"][name] > limit
    ]


def main() -> int:
    """Soak every bundle named, print what it kept, and give the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path, help="bundle folders")
    parser.add_argument("--reloads", type=int, default=200, help="times that each is loaded and closed")
    parser.add_argument("--callers", type=int, default=500, help="threads that ask it once each")
    parser.add_argument("--threads", type=int, default=2, help="threads of the backend")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(soak(options.bundles[0], options.threads, options.reloads, options.callers)))
        return 0
    failed = False
    for bundle in options.bundles:
        command = [sys.executable, __file__, "--worker", str(bundle)]
        for name in ("reloads", "callers", "threads"):
            command += [f"--{name}", str(getattr(options, name))]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **ALLOCATOR})
        parts = json.loads(done.stdout)
        for name, part in parts.items():
            told = ", ".join(f"{key} {part['early'][key]:.1f} -> {part['end'][key]:.1f}" for key in LIMITS)
            print(f"{bundle.name}, {name}: {told}", flush=True)
            for sentence in grown(part):
                failed = True
                print(f"  {sentence}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
