"""Every figure of `arriero plan` beside what the build then measures, on random checkpoints of several shapes.

    python benchmarks/plan_accuracy.py FOLDER [--shapes many-experts wide ..] [--targets tvm-fp32 ..]

Each shape is written, planned, built with its targets in a process of its own, and deleted. A line per figure:
planned, measured, and planned over measured. Memory is the peak that the process holds beside mapped files (RssAnon),
disk the most that a stage's folder took, looked at every twentieth of a second. Times are rough on purpose, and on a
busy machine they are that machine's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from random_model import write_model

from arriero.runtimes.user_cache import VARIABLE

SHAPES: dict[str, dict[str, Any]] = {
    "many-experts": {
        "num_hidden_layers": 4,
        "hidden_size": 512,
        "num_local_experts": 64,
        "intermediate_size": 128,
        "intermediate_size_mlp": 1024,
    },
    "wide": {"num_hidden_layers": 2, "hidden_size": 1024, "num_local_experts": 2, "intermediate_size": 3072},
    "dense": {"num_hidden_layers": 4, "moe_layers": [], "intermediate_size_mlp": 4096},
    "deep": {
        "num_hidden_layers": 48,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_local_experts": 4,
        "intermediate_size": 256,
        "intermediate_size_mlp": 512,
        "vocab_size": 8192,
    },
    "large-vocabulary": {"num_hidden_layers": 2, "hidden_size": 512, "num_local_experts": 2, "vocab_size": 128000},
    "pictures": {"num_hidden_layers": 2, "hidden_size": 512, "num_local_experts": 4, "vocab_size": 1024},
}
# Of the multimodal shapes, what of the embedded model's tower is changed; every prompt shows a picture.
TOWERS = {"pictures": {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 2048}}
TARGETS = {
    "ort-fp32": "backend: onnxruntime, profile: fp32",
    "ort-int8": "backend: onnxruntime, profile: int8",
    "tvm-int4": "backend: tvm, profile: int4",
    "tvm-fp32": "backend: tvm, profile: fp32",
}
BUILD = """version: 1
model: model
modalities: {modalities}
output: bundles
targets:
{targets}
calibration: {{set: calibration.jsonl}}
parity: {{cases: {{set: cases.jsonl}}, answers: forced, thresholds: {thresholds}}}
"""


@dataclass(frozen=True)
class Figure:
    """One figure of a plan and what was measured, in bytes or seconds."""

    name: str
    planned: float
    measured: float
    unit: str = "MiB"

    @property
    def ratio(self) -> float:
        """Planned over measured."""
        return self.planned / self.measured

    def __str__(self) -> str:
        size = 2**20 if self.unit == "MiB" else 1
        both = (f"{value / size:10,.1f} {self.unit:3}" for value in (self.planned, self.measured))
        return f"{self.name:24} {' '.join(both)} {self.ratio:6.2f}"


def arriero(folder: Path, *arguments: str, allowed: Collection[int] = (0,)) -> str:
    """Run the command in `folder`; gives its standard output. Raises RuntimeError for other exit codes."""
    command = [sys.executable, "-m", "arriero.export", *arguments]
    alone = {**os.environ, VARIABLE: ""}  # every stage is made here, where it is measured
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, env=alone)
    if done.returncode not in allowed:
        raise RuntimeError(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}")
    return done.stdout


def stage_keys(folder: Path) -> dict[str, str]:
    """The keys of the stages of the build that `folder` holds, by name."""
    return {
        stage["name"]: stage["key"] for stage in json.loads(arriero(folder, "plan", "build.yaml", "--json"))["stages"]
    }


def stage_record(output: Path, name: str, key: str) -> dict[str, Any]:
    """What a finished stage recorded, with the bytes of its files as `disk`."""
    record: dict[str, Any] = json.loads((output / ".work" / f"{name}-{key}" / "stage.json").read_text())
    return record | {"disk": sum(file["bytes"] for file in record["files"].values())}


class DiskWatch(threading.Thread):
    """Looks at the folders of a build's stages until it is stopped."""

    def __init__(self, output: Path) -> None:
        super().__init__(daemon=True)
        self.output, self.stopped = output, threading.Event()
        self.most: dict[str, int] = {}  # by a stage's name and key

    def run(self) -> None:
        """Keep the most bytes of each."""
        while not self.stopped.wait(0.05):
            for stage in (self.output / ".work").glob("*-*"):
                name = stage.name.removesuffix(".partial")
                # `os.walk` goes on where a folder is gone by the time it is looked into
                taken = sum(blocks(Path(folder) / file) for folder, _, files in os.walk(stage) for file in files)
                self.most[name] = max(self.most.get(name, 0), taken)


def blocks(path: Path) -> int:
    """The bytes that a file takes on disk; it may be gone."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return 0
    return 512 * status.st_blocks if stat.S_ISREG(status.st_mode) else 0


def figures(plan: dict[str, Any], keys: dict[str, str], output: Path, disk: dict[str, int]) -> Iterator[Figure]:
    """Every figure of `plan` beside what the finished build in `output` measured; `keys` are those of its stages."""
    for stage in plan["stages"]:
        name, key = stage["name"], keys[stage["name"]]
        record = stage_record(output, name, key)
        yield Figure(f"{name}: time", stage["seconds"], record["seconds"], "s")
        yield Figure(f"{name}: memory", stage["memory"], record["peak_memory_bytes"])
        yield Figure(f"{name}: disk", stage["disk"], disk[f"{name}-{key}"])
    for target in plan["targets"]:
        manifest = json.loads((output / target["name"] / "manifest.json").read_text())
        weights = sum(
            entry["bytes"] for name, entry in manifest["files"].items() if name.endswith((".safetensors", ".bin"))
        )
        yield Figure(f"{target['name']}: weights", target["weights_bytes"], weights)
        per_token = manifest["kv_bytes_per_token"]
        layers = manifest["model"]["text"]["layers"]
        slots = [
            min(target["context"], plan["model"]["chunk"]) if layer["attention"] == "chunked" else target["context"]
            for layer in layers
        ]
        kv = target["batch"] * sum(
            per_token[layer["attention"]] * count for layer, count in zip(layers, slots, strict=True)
        )
        yield Figure(f"{target['name']}: cache", target["kv_bytes"], kv)


def prompts(folder: Path, pictures: bool) -> list[dict[str, Any]]:
    """The lines of a set of long prompts, each with a picture in `folder` before it, or without."""
    lines: list[dict[str, Any]] = []
    draw = np.random.default_rng(0)
    for n in range(24):
        text, answer = f"What is {n} + {n + 7}? " + "word " * 120, str(2 * n + 7)
        if not pictures:
            lines.append({"prompt": text, "answer": answer})
            continue
        Image.fromarray(draw.integers(0, 256, (128, 128, 3), np.uint8)).save(folder / f"{n}.png")
        content = [{"type": "image", "path": f"{n}.png"}, {"type": "text", "text": text}]
        lines.append({"messages": [{"role": "user", "content": content}], "answer": answer})
    return lines


def measure(folder: Path, shape: str, chosen: Collection[str]) -> list[Figure]:
    """Write, plan and build one shape in `folder` for the `chosen` targets."""
    write_model(folder / "model", 0, SHAPES[shape], TOWERS.get(shape))
    lines = prompts(folder, shape in TOWERS)
    for name, part in (("calibration", lines), ("cases", lines[:6])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in part))
    targets = "\n".join(
        f"  - {{name: {name}, {rest}, context: 4096, batch: 2}}" for name, rest in TARGETS.items() if name in chosen
    )
    modalities = "[text, image]" if shape in TOWERS else "[text]"
    thresholds = "{kl_over_rtn: 1.0}" if "int4" in targets else "{}"  # which goes with calibration
    (folder / "build.yaml").write_text(BUILD.format(targets=targets, modalities=modalities, thresholds=thresholds))
    before = json.loads(arriero(folder, "plan", "build.yaml", "--json"))
    watch = DiskWatch(folder / "bundles")
    watch.start()
    arriero(folder, "build", "build.yaml")
    watch.stopped.set()
    watch.join()
    return list(figures(before, stage_keys(folder), folder / "bundles", watch.most))


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder for checkpoints and bundles, emptied shape by shape")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    arguments = parser.parse_args()
    for name in arguments.shapes:
        folder = arguments.folder / name
        folder.mkdir(parents=True)
        for figure in measure(folder, name, arguments.targets):
            print(f"{name:18} {figure}", flush=True)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
