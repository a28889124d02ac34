"""Prefill and decode speed of bundles, and of llama.cpp beside them: interleaved, and held against the roofline.

    python benchmarks/speed.py int8=bundles/portable-int8 int4=bundles/portable-int4
    python benchmarks/speed.py int8=out/mini-int8 --llama-bench llama-bench --gguf Q8_0=mini-Q8_0.gguf

Every contender lives in a process of its own and answers one round at a time, so that no two ever compute together;
the order turns from round to round. Every file is dropped from the system's memory and read anew first: pages that came
there piecemeal, while a build was short of memory, have been seen to cost a quarter of the speed. What counts are
ratios within a round: their median is printed, not the best. The roofline of decode is the bandwidth with which the
same threads read a large buffer, measured in every round too, over the bytes that one token touches: of weights all of
the decoder's matrices, and k of E experts, and the keys and values of the `--depth` tokens before it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from contenders import Worker, in_turn, named
from rich.console import Console
from rich.table import Table
from roofline import build_probe, read_sum

from arriero.export.proof.compare import decoder_bytes
from arriero.runtimes.manifest import Manifest

LINE = 8  # words of a cache line
READ = 1 << 30  # bytes of the buffer whose reading is the roofline, beyond any cache
READS = 4  # the first after something else has been seen at a fifth to two thirds of the next ones


class Bundle:
    """A bundle in a worker process."""

    def __init__(self, path: Path, threads: int) -> None:
        self.worker = Worker(__file__, "--worker", str(path), "--threads", str(threads))
        self.ready: dict[str, float] = self.worker.ready
        self.manifest = Manifest.read(path)

    def bytes_per_token(self, depth: int) -> int:
        """Bytes that a token touches after `depth` others."""
        return touched_bytes(self.manifest) + cache_bytes(self.manifest, depth)

    def measure(self, prefill: int, decode: int, depth: int) -> dict[str, float]:
        """Tokens per second of one round."""
        answer: dict[str, float] = self.worker.ask([prefill, decode, depth])
        return answer


class LlamaCpp:
    """A GGUF file under llama.cpp's own `llama-bench`, one process per round."""

    def __init__(self, program: str, gguf: Path, threads: int, options: Sequence[str]) -> None:
        self.command = [program, "-m", str(gguf), "-t", str(threads), "-r", "1", "-o", "jsonl", *options]
        self.ready = {"load_s": math.nan, "rss_mib": math.nan}

    def bytes_per_token(self, depth: int) -> None:
        """None: which bytes it reads is its own affair."""

    def measure(self, prefill: int, decode: int, depth: int) -> dict[str, float]:
        """Tokens per second of one round."""
        return {"prefill": self._rate(prefill, 0, 0), "decode": self._rate(0, decode, depth)}

    def _rate(self, prefill: int, decode: int, depth: int) -> float:
        options = ["-p", str(prefill), "-n", str(decode), "-d", str(depth)]
        lines = subprocess.run(
            [*self.command, *options], check=True, capture_output=True, text=True
        ).stdout.splitlines()
        (run,) = (json.loads(line) for line in lines if line.startswith("{"))
        return float(run["avg_ts"])


def touched_bytes(manifest: Manifest, rows: int = 1) -> int:
    """Bytes of weights that a decode step of so many rows reads, each row drawing its experts evenly."""
    model = manifest.model
    share = model.num_experts_per_tok / model.num_local_experts if model.num_local_experts else 1.0
    return decoder_bytes(manifest.weights, 1 - (1 - share) ** rows)


def cache_bytes(manifest: Manifest, depth: int) -> int:
    """Bytes of keys and values that the token after `depth` others reads."""
    model = manifest.model
    held = {"chunked": depth % model.attention_chunk_size, "global": depth}
    return sum(manifest.kv_bytes_per_token[layer.attention] * held[layer.attention] for layer in model.layers)


def serve(bundle: Path, threads: int) -> None:
    """The worker: opens the bundle, then answers a line `[prefill, decode, depth]` with tokens per second."""
    from arriero import load
    from arriero.runtimes.processor.processor import Prompt

    started = time.perf_counter()
    session = load(bundle, threads)
    loaded = time.perf_counter() - started
    rng = np.random.default_rng(0)
    special = {session.spec.image_token_id, *session.spec.eos_token_ids}
    ordinary = np.array([token for token in range(session.spec.vocab_size) if token not in special])

    def round_of(prefill: int, decode: int, depth: int) -> dict[str, float]:
        start = time.perf_counter()
        session.prefill(Prompt(rng.choice(ordinary, prefill), None))
        prefilled = time.perf_counter() - start
        state = session.prefill(Prompt(rng.choice(ordinary, max(1, depth)), None))
        start = time.perf_counter()
        for token in rng.choice(ordinary, decode):
            session.decode(state, int(token))
        return {"prefill": prefill / prefilled, "decode": decode / (time.perf_counter() - start)}

    round_of(16, 4, 0)
    print(json.dumps({"load_s": loaded, "rss_mib": resident_mib()}), flush=True)
    for line in sys.stdin:
        print(json.dumps(round_of(*json.loads(line))), flush=True)


def read_anew(path: Path) -> None:
    """Have the system forget what it holds of the files under `path`, and read them in one go."""
    for file in [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file()):
        with file.open("rb", buffering=0) as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while opened.read(1 << 24):
                pass


def resident_mib() -> float:
    """Resident memory of this process, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def make_buffer() -> np.ndarray:
    """The buffer u64 [n] whose reading is the roofline, aligned to a cache line as numpy's own is not."""
    room = np.ones(READ // 8 + LINE, np.uint64)
    return room[-room.ctypes.data % 64 // 8 :][: READ // 8]


def read_bandwidth(probe: ctypes.CDLL, buffer: np.ndarray, threads: int) -> float:
    """Bytes per second with which `threads` read `buffer` u64 [n], n a multiple of `LINE`: the best of `READS`."""
    # in whole rows of 64 bytes, so that no part begins within one
    parts = [part.reshape(-1) for part in np.array_split(buffer.reshape(-1, LINE), threads)]

    def seconds() -> float:
        workers = [threading.Thread(target=read_sum, args=(probe, part)) for part in parts]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return time.perf_counter() - start

    return buffer.nbytes / min(seconds() for _ in range(READS))


def table(
    rounds: list[dict[str, dict[str, float]]], contenders: dict[str, Any], bandwidth: list[float], depth: int
) -> Table:
    """Medians over the rounds; ratios are taken round by round against the first contender."""
    base = next(iter(contenders))
    shown = Table(title=f"{len(rounds)} rounds; read bandwidth {statistics.median(bandwidth) / 1e9:.1f} GB/s")
    columns = ("", "prefill tok/s", f"÷ {base}", "decode tok/s", f"÷ {base}", "of the roofline", "load s", "RSS MiB")
    for column in columns:
        shown.add_column(column, justify="left" if not column else "right")

    def median(value: Callable[[int], float]) -> float:
        return statistics.median(value(number) for number in range(len(rounds)))

    for name, contender in contenders.items():
        cells = [name]
        for kind in ("prefill", "decode"):
            cells.append(f"{median(lambda n, kind=kind, name=name: rounds[n][name][kind]):.1f}")
            cells.append(f"{median(lambda n, kind=kind, name=name: rounds[n][name][kind] / rounds[n][base][kind]):.2f}")
        touched = contender.bytes_per_token(depth)
        share = None if touched is None else median(lambda n: rounds[n][name]["decode"] * touched / bandwidth[n])  # noqa: B023
        cells.append("" if share is None else f"{100 * share:.0f} %")
        cells += [f"{contender.ready['load_s']:.2f}", f"{contender.ready['rss_mib']:.0f}"]
        shown.add_row(*cells)
    return shown


def main() -> None:
    """Parse the command line, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="*", metavar="NAME=BUNDLE", help="bundles; the first contender is the base")
    parser.add_argument("--gguf", action="append", default=[], metavar="NAME=FILE", help="a peer's file for llama.cpp")
    parser.add_argument("--llama-bench", default="llama-bench", help="llama.cpp's program")
    parser.add_argument("--no-repack", action="store_true", help="also run every GGUF without llama.cpp's repacking")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of every contender")
    parser.add_argument("--prefill", type=int, default=512, help="prompt tokens")
    parser.add_argument("--decode", type=int, default=64, help="tokens decoded")
    parser.add_argument("--depth", type=int, default=0, help="tokens that are read before the first is decoded")
    parser.add_argument("--rounds", type=int, default=5, help="rounds")
    parser.add_argument("--json", type=Path, help="also write every round there")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        serve(arguments.worker, arguments.threads)
        return
    contenders: dict[str, Any] = {}
    for name, path in named(arguments.bundles):
        read_anew(path)
        contenders[name] = Bundle(path, arguments.threads)
    for name, path in named(arguments.gguf):
        read_anew(path)
        for suffix, options in [("", []), *([(" no repack", ["--repack", "0"])] if arguments.no_repack else [])]:
            contenders[name + suffix] = LlamaCpp(arguments.llama_bench, path, arguments.threads, options)
    if not contenders:
        parser.error("name at least one bundle or --gguf")
    with tempfile.TemporaryDirectory() as folder:
        probe = build_probe(Path(folder))
    buffer = make_buffer()
    rounds, bandwidth = [], []
    for number in range(arguments.rounds):
        bandwidth.append(read_bandwidth(probe, buffer, arguments.threads))
        wanted = (arguments.prefill, arguments.decode, arguments.depth)
        rounds.append({name: contenders[name].measure(*wanted) for name in in_turn(contenders, number)})
    Console().print(table(rounds, contenders, bandwidth, arguments.depth))
    if arguments.json:
        arguments.json.write_text(json.dumps({"bandwidth": bandwidth, "rounds": rounds}, indent=1))


if __name__ == "__main__":
    main()
