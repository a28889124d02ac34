"""Decoding within a part of the memory that all experts take: tokens/s, hit rate, reads beside the drive's own speed.

    python benchmarks/capped_experts.py 'synthetic://maverick?layers=2' /scratch/maverick --profile int4
    python benchmarks/capped_experts.py bundles/mini /scratch/mini --shares 25 50 100 --tokens 64
    python benchmarks/random_gguf.py maverick:4 maverick-4.gguf
    python benchmarks/capped_experts.py 'synthetic://maverick?layers=4' /scratch/maverick --profile int4-nearest.yaml \
        --cgroup --gguf maverick-4.gguf --llama-bench PROGRAM

The text model is lowered and compiled for this machine into the folder, once; int4 is rounded to nearest, as speed does
not depend on it. Then each share of the experts is measured in a process of its own, over random tokens: a prompt, then
one token at a time. The drive is read with as many threads and pieces as large, right before, memory before and after;
"foretold" is what `arriero plan --memory` says of uniform routing at these speeds. RssAnon is the most that the process
had. With `--cgroup` each share runs in a control group whose memory, page cache included, is bounded by the cap and
some for libraries; llama.cpp then decodes the GGUF file, mapped into memory, within the same bound.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from memory_cgroup import MemoryGroup, memory_group

from arriero.errors import ArrieroError
from arriero.export.build_file.locate import resolve_model
from arriero.export.build_file.model_spec import model_spec
from arriero.export.compile import Device
from arriero.export.compile.build_kernels import build_kernels
from arriero.export.compile.tvm import compile_graphs
from arriero.export.machine.read_speed import ReadSpeed, drive_speed, memory_speed
from arriero.export.pipeline.foretell_cap import StoredWeights, foretell, uniform_rates
from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.config import ModelConfig
from arriero.graphs.lower.part import Lowering
from arriero.graphs.lower.tvm import lower
from arriero.graphs.names import TEXT_PREFIX
from arriero.graphs.trace import trace_embed, trace_text
from arriero.profiles.recipe import Profile, load_profile
from arriero.runtimes.backend import MemoryCap, ModelSpec
from arriero.runtimes.cpu import architecture, describe_processor, usable_cores
from arriero.runtimes.memory import anonymous_memory
from arriero.runtimes.memory_cap import RecordSize
from arriero.runtimes.tvm import TvmBackend
from arriero.traits import TRAITS

PARTS = {"text": trace_text, "embed": trace_embed}
CONTEXT = 4096
SPARE = 8 << 20  # what the process may have grown by meanwhile
DISK_BLOCK = 512  # bytes of what the system counts reads in
BOUNDED = {  # what a control group adds to a line: words, and what the number is divided by, and its unit
    "group_peak": ("with page cache at most", 1 << 20, " MiB"),
    "peer_tokens_per_second": ("llama.cpp's mapped file", 1, " tokens/s"),
    "peer_bytes": ("in all read", 1e9, " GB"),
    "peer_group_peak": ("at most", 1 << 20, " MiB"),
}
LIBRARIES = 256 << 20  # mapped files of Python and its packages, which no cap counts and a control group does


def make(checkpoint: Checkpoint, config: ModelConfig, profile: Profile, folder: Path) -> None:
    """Lower and compile the text model into `folder`, unless that is done."""
    if (folder / "text.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    schemes = profile.assign(checkpoint.tensors)
    for part, trace in PARTS.items():
        graph: ir.Model = trace(config, checkpoint, folder / f"{part}-traced.onnx")
        lower(part, graph, Lowering(config, checkpoint, schemes, folder, _show))
    print()
    build_kernels(architecture(), folder / "kernels.o")
    compile_graphs(folder, list(PARTS), Device(kernels=folder / "kernels.o"))


def _show(done: int, total: int) -> None:
    if sys.stdout.isatty():
        print(f"\rwriting weights: {done / 1e9:.1f} of {total / 1e9:.1f} GB", end="", flush=True)


def text_spec(config: ModelConfig) -> ModelSpec:
    """The model without its vision tower, which is not made."""
    return replace(model_spec(config), vision=None)


def layers_of(folder: Path) -> list[RecordSize]:
    """The records of the layers' experts."""
    entries = json.loads((folder / "text.json").read_text())["experts"]
    return [RecordSize(len(entry["records"]), entry["bytes"]) for entry in entries]


def cap_of(folder: Path, config: ModelConfig, share: int, threads: int | None) -> int:
    """The smallest cap in bytes that has room for `share` per cent of the experts."""
    try:
        TvmBackend(folder, text_spec(config), threads, memory=MemoryCap(1, CONTEXT, 1))
    except ArrieroError as error:  # the smallest cap holds one expert of each layer
        least = int(re.findall(r"Give it (\d+)MiB", str(error))[0]) << 20
    more = sum((max(1, layer.experts * share // 100) - 1) * layer.nbytes for layer in layers_of(folder))
    return least + more + SPARE


def measure(folder: Path, config: ModelConfig, options: argparse.Namespace) -> dict[str, Any]:
    """What the options' cap gives, in this process."""
    spec, cap = text_spec(config), MemoryCap(options.cap, CONTEXT, 1)
    file = next(iter(sorted(folder.glob("weights/text-experts-*"))))
    drive, buffered = drive_speed(file)
    backend = TvmBackend(folder, spec, options.threads, memory=cap)
    draw, cache = np.random.default_rng(0), backend.new_cache(1, CONTEXT)
    none = np.zeros((0, spec.hidden_size), np.float32)

    def step(count: int) -> None:
        ids = draw.integers(0, spec.vocab_size, (1, count))
        positions = cache.lengths[:, None] + np.arange(count)
        backend.forward(backend.embed(ids, none), positions, cache, np.array([count - 1]))

    piece = min(backend.piece, options.prompt)
    start = time.perf_counter()
    for _ in range(options.prompt // piece):
        step(piece)
    prompt = time.perf_counter() - start
    for _ in range(options.warm):
        step(1)
    before, start = backend.statistics().layers, time.perf_counter()
    for _ in range(options.tokens):
        step(1)
    seconds, after = time.perf_counter() - start, backend.statistics().layers
    totals = {
        name: sum(getattr(one, name) for one in after) - sum(getattr(one, name) for one in before)
        for name in ("hits", "misses", "bytes", "seconds", "waited")
    }
    result = {
        "cap": cap.nbytes,
        "slots": after[0].slots,
        "piece": piece,
        "prompt_tokens_per_second": options.prompt // piece * piece / prompt,
        "prompt_bytes": sum(one.bytes for one in before),
        "tokens_per_second": options.tokens / seconds,
        "hit_rate": totals["hits"] / (totals["hits"] + totals["misses"]),
        "bytes_per_token": totals["bytes"] / options.tokens,
        "read_rate": totals["bytes"] / totals["seconds"] if totals["seconds"] else 0.0,
        "drive_rate": drive,
        "buffered": buffered,
        "waited_share": totals["waited"] / seconds,
        "anonymous": anonymous_memory(),
    }
    backend.close()
    return result


def run_capped(cap: int, options: argparse.Namespace) -> dict[str, Any]:
    """What a process of its own measures under `cap`; where it is to be bounded by a control group, and so the peer."""
    command = [sys.executable, *sys.argv, "--cap", str(cap)]
    if not options.cgroup:
        return dict(printed(command))
    with memory_group(cap + LIBRARIES) as group:
        one = dict(printed(command, group)) | {"group_peak": group.peak}
    if options.gguf is not None:
        with memory_group(cap + LIBRARIES) as group:
            one |= peer_speed(options, group)
    return one


def printed(command: Sequence[str | Path], group: MemoryGroup | None = None) -> Any:
    """The JSON that a process prints, which runs in `group` where there is one."""
    enter = None if group is None else group.enter
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, preexec_fn=enter).stdout)


def peer_speed(options: argparse.Namespace, group: MemoryGroup) -> dict[str, Any]:
    """What llama.cpp does in `group`: tokens/s of the second of two runs, and the bytes of both."""
    with options.gguf.open("rb") as file:  # what others read of it would not count in the group
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [options.llama_bench, "-m", options.gguf, "-p", "0", "-n", str(options.tokens), "-r", "2", "-o", "json"]
    command += ["-t", str(options.threads or usable_cores()), "-lm", "mmap", "--repack", "0"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_inblock
    (result,) = printed(command, group)
    read = (resource.getrusage(resource.RUSAGE_CHILDREN).ru_inblock - before) * DISK_BLOCK
    return {"peer_tokens_per_second": result["samples_ts"][-1], "peer_bytes": read, "peer_group_peak": group.peak}


def main() -> None:
    """Parse the command line; make the model, and measure each share in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint, as a build file names it")
    parser.add_argument("folder", type=Path, help="where the compiled model goes, or is")
    parser.add_argument("--profile", default="int8")
    parser.add_argument(
        "--shares", type=int, nargs="+", default=[25, 50, 100], help="per cent of the experts in memory"
    )
    parser.add_argument("--prompt", type=int, default=512, help="tokens that are read first")
    parser.add_argument("--warm", type=int, default=32, help="tokens decoded before the clock starts")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cgroup", action="store_true", help="bound each share's memory by a control group too")
    parser.add_argument("--gguf", type=Path, help="the same shape for llama.cpp; with --cgroup")
    parser.add_argument("--llama-bench", help="its program")
    parser.add_argument("--json", type=Path, help="also write all figures here")
    parser.add_argument("--cap", type=int, help=argparse.SUPPRESS)  # what a process of its own measures
    options = parser.parse_args()
    checkpoint = Checkpoint.open(resolve_model(options.model, Path.cwd()))
    config, profile = checkpoint.model_config(), load_profile(options.profile).rtn_baseline()
    if options.cap is not None:
        print(json.dumps(measure(options.folder, config, options)))
        return
    make(checkpoint, config, profile, options.folder)
    used = [info for info in checkpoint.tensors.values() if info.name.startswith(TEXT_PREFIX)]
    weights = StoredWeights.of(config.text, used, profile, TRAITS["tvm"])
    print(f"{options.model} as {options.profile} on {describe_processor()}; drive read by its own: see each line")
    results = {}
    for share in options.shares:
        cap, before = cap_of(options.folder, config, share, options.threads), memory_speed()
        one = run_capped(cap, options)
        one["memory_rate"] = (before + memory_speed()) / 2
        own = ReadSpeed(one["memory_rate"], one["drive_rate"], None)
        capped = foretell("", MemoryCap(one["cap"], CONTEXT, 1), weights, config, uniform_rates(config.text), own, 4)
        results[share] = one | {"foretold_tokens_per_second": capped.tokens_per_second}
        print(
            f"{share:3} % of experts ({one['slots']} a layer), cap {one['cap'] / 2**20:.0f} MiB, RssAnon "
            f"{one['anonymous'] / 2**20:.0f} MiB: prompt {one['prompt_tokens_per_second']:.1f} tokens/s in pieces of "
            f"{one['piece']} ({one['prompt_bytes'] / 1e9:.2f} GB read), decode {one['tokens_per_second']:.2f} tokens/s "
            f"(foretold {capped.tokens_per_second:.2f}, memory at {one['memory_rate'] / 1e9:.1f} GB/s), "
            f"hit rate {one['hit_rate']:.0%}, "
            f"{one['bytes_per_token'] / 1e6:.1f} MB a token, read at {one['read_rate'] / 1e9:.2f} GB/s of "
            f"{one['drive_rate'] / 1e9:.2f}, {one['waited_share']:.0%} of the time waited"
            + "".join(
                f"; {words} {one[key] / by:.2f}{unit}" for key, (words, by, unit) in BOUNDED.items() if key in one
            ),
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
