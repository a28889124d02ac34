"""Prefill and decode speed of bundles, and of llama.cpp beside them: interleaved, and held against the limits.

    python benchmarks/speed.py int8=bundles/portable-int8 int4=bundles/portable-int4
    python benchmarks/speed.py int8=out/mini-int8 --llama-bench llama-bench --gguf Q8_0=mini-Q8_0.gguf --every-setting
    python benchmarks/speed.py int8=… --depth 0 8000 --rows 1 8 --llama-bench llama.cpp=… ik=… --gguf Q8_0=…

Every contender lives in a process of its own and answers one question at a time, so that no two ever compute together;
the order turns from round to round. Every file is dropped from the system's memory and read anew first: pages that came
there piecemeal, while a build was short of memory, have been seen to cost a quarter of the speed. What counts are
ratios within a round: their median is printed with the lowest and the highest, for each case to the first bundle and to
the best of each peer, which is the one of the highest median of its files and settings.

Limits are measured in every round too. That of decode is the bandwidth with which the same threads read a large buffer,
over the bytes that a step touches: of weights all of the decoder's matrices, and as many experts as its rows draw, and
the keys and values of the `--depth` tokens before. That of prefill is what the same threads reach in a loop of nothing
but dots of int8; a prompt's work are the products with the layers' matrices, every layer's for every token. After
`--depth` tokens, and in steps of several rows (`llama-batched-bench` beside the peer's `llama-bench`), decode is timed
alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from contenders import in_turn, named, read_anew
from llama_bench import LlamaCpp, Program
from rich.console import Console
from rich.table import Table
from roofline import build_probe, dot_rate, make_buffer, read_bandwidth
from timed_bundle import Bundle, Case

from arriero.runtimes.cpu import describe_processor

Contender = Bundle | LlamaCpp
Round = dict[str, dict[str, float]]  # by case and contender: tokens per second
LIMITS = "limits"  # in a round's place of a case: what the machine gave then, "read" bytes and "dots" per second


def best_peers(rounds: list[Round], case: str, contenders: Mapping[str, Contender]) -> list[str]:
    """Of each program the file and setting of the highest median in a case, of those that never failed in it."""
    programs: dict[Program, list[str]] = {}
    for name, contender in contenders.items():
        if isinstance(contender, LlamaCpp) and not any(math.isnan(one[case][name]) for one in rounds):
            programs.setdefault(contender.program, []).append(name)
    return [
        max(names, key=lambda name: statistics.median(one[case][name] for one in rounds)) for names in programs.values()
    ]


def spread(ratios: list[float]) -> str:
    """The median of ratios, the lowest and the highest."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def share_of_limit(bundle: Bundle, case: Case, speed: float, limits: Mapping[str, float]) -> float:
    """What share of the machine's limit a bundle's `speed` in a case is: of multiply-adds, or of bandwidth."""
    if case.kind == "prefill":
        return speed * bundle.operations(case) / case.tokens / limits["dots"]
    return speed / case.rows * bundle.bytes_per_step(case) / limits["read"]


def table(rounds: list[Round], contenders: Mapping[str, Contender], case: Case) -> Table:
    """One case: tokens per second, and the ratios round by round."""
    bundles = [name for name, contender in contenders.items() if isinstance(contender, Bundle)]
    against = [*bundles[:1], *best_peers(rounds, str(case), contenders)]
    limit = "of the dots" if case.kind == "prefill" else "of the bandwidth"
    shown = Table("", "tokens/s", *(f"÷ {name}" for name in against), limit, title=str(case), title_justify="left")
    for name, contender in contenders.items():
        speeds = [one[str(case)][name] for one in rounds]
        if any(map(math.isnan, speeds)):
            shown.add_row(name, "failed")
            continue
        ratios = [spread([one[str(case)][name] / one[str(case)][other] for one in rounds]) for other in against]
        share = ""
        if isinstance(contender, Bundle):
            shares = [share_of_limit(contender, case, one[str(case)][name], one[LIMITS]) for one in rounds]
            share = f"{statistics.median(shares):.0%}"
        shown.add_row(name, f"{statistics.median(speeds):.1f}", *ratios, share)
    return shown


def heading(rounds: list[Round], contenders: Mapping[str, Contender], threads: int) -> Iterator[str]:
    """What the machine is and gave, and what bundles took to load."""
    read, dots = ([one[LIMITS][name] / 1e9 for one in rounds] for name in ("read", "dots"))
    yield f"{describe_processor()}; {threads} threads, {len(rounds)} rounds"
    yield f"memory read at {min(read):.1f} to {max(read):.1f} GB/s"
    yield f"dots of int8 at {min(dots):.0f} to {max(dots):.0f} GOP/s"
    for name, contender in contenders.items():
        if isinstance(contender, Bundle):
            yield f"{name}: loaded in {contender.ready['load_s']:.2f} s, {contender.ready['rss_mib']:.0f} MiB resident"


def peers(options: argparse.Namespace) -> Iterator[tuple[str, LlamaCpp]]:
    """Every file under every program in every setting, or in the one of each program."""
    files = dict(named(options.gguf))
    for path in files.values():
        read_anew(path)
    for text in options.llama_bench if files else []:
        name, _, path = text.rpartition("=")
        program = Program(Path(path))
        for (file, gguf), setting in itertools.product(files.items(), program.settings(options.every_setting)):
            yield f"{name} {file}{setting}".lstrip(), LlamaCpp(program, gguf, options.threads, setting)


def measure(cases: list[Case], contenders: Mapping[str, Contender], options: argparse.Namespace) -> list[Round]:
    """All rounds, each with what the machine gave just before; kept after every one."""
    with tempfile.TemporaryDirectory() as folder:
        probe = build_probe(Path(folder))
    buffer, rounds = make_buffer(), list[Round]()
    for number in range(options.rounds):
        limits = {"read": read_bandwidth(probe, buffer, options.threads), "dots": dot_rate(probe, options.threads)}
        one: Round = {LIMITS: limits}
        for case in cases:
            one[str(case)] = {name: contenders[name].measure(case) for name in in_turn(contenders, number)}
        rounds.append(one)
        if options.json:
            options.json.write_text(json.dumps({"processor": describe_processor(), "rounds": rounds}, indent=1))
    return rounds


def main() -> None:
    """Parse the command line, measure, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="*", metavar="NAME=BUNDLE", help="bundles; the first contender is the base")
    parser.add_argument("--gguf", nargs="+", default=[], metavar="NAME=FILE", help="files for llama.cpp")
    programs = {"nargs": "+", "default": ["llama-bench"], "metavar": "[NAME=]PROGRAM"}
    parser.add_argument(
        "--llama-bench", **programs, help="llama.cpp's program, one or several versions and forks of it"
    )
    parser.add_argument(
        "--every-setting", action="store_true", help="peers with and without repacking, flash attention"
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of every contender")
    parser.add_argument("--prefill", type=int, default=512, help="prompt tokens; 0 for none")
    parser.add_argument("--decode", type=int, default=64, help="tokens decoded")
    parser.add_argument("--depth", type=int, nargs="+", default=[0], help="tokens read before the first is decoded")
    parser.add_argument("--rows", type=int, nargs="+", default=[1], help="sequences that are decoded together")
    parser.add_argument("--rounds", type=int, default=5, help="rounds")
    parser.add_argument("--json", type=Path, help="also write every round there, as it ends")
    options = parser.parse_args()
    contenders: dict[str, Contender] = {}
    for name, path in named(options.bundles):
        read_anew(path)
        contenders[name] = Bundle(path, options.threads)
    contenders |= dict(peers(options))
    if not contenders:
        parser.error("name at least one bundle or --gguf")
    cases = [Case("prefill", options.prefill)] if options.prefill else []
    cases += [Case("decode", options.decode, depth, rows) for depth in options.depth for rows in options.rows]
    rounds = measure(cases, contenders, options)
    console = Console()
    for line in heading(rounds, contenders, options.threads):
        console.print(line, highlight=False)
    for case in cases:
        console.print(table(rounds, contenders, case))


if __name__ == "__main__":
    main()
