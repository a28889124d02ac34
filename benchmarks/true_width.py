"""What a build of released shapes takes: memory, processor time and disk of each stage, planned and measured.

    python benchmarks/true_width.py FOLDER --models scout:1 scout:2 maverick:2 --profiles int8 int4 --memory 6GiB
    python benchmarks/true_width.py FOLDER --report

Sources are `synthetic://NAME?layers=N`: true widths, drawn weights. Each is planned and built for TVM in a process of
its own under `budgets.host_memory`, measured, and deleted; a line per stage goes into FOLDER/stages.jsonl, and what
stands there is not built again. `--report` prints the table, the slope per layer where one model was built with several
numbers of layers, with what it comes to for the whole model, which is extrapolated and not measured, and the slope per
thousand tokens where it was built with several numbers of these (of calibration for `calibrate`, of parity for the
rest). Memory is the peak that the process holds beside mapped files (RssAnon), disk what the stage leaves.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from plan_accuracy import arriero, stage_keys, stage_record
from tokenizers import Tokenizer

from arriero.graphs.sources.released_configs import released_config
from arriero.graphs.sources.synthetic import EMBEDDED_MODEL
from arriero.runtimes.cpu import describe_processor

BUILD = """version: 1
model: {url}
modalities: [text]
output: bundles
budgets: {{host_memory: {memory}}}
targets:
  - {{name: {profile}, backend: tvm, profile: {profile}, context: 4096, batch: 1}}
calibration: {{set: calibration.jsonl}}
parity: {{cases: {{set: cases.jsonl}}, answers: forced}}
"""
SAMPLE = 512  # tokens of a calibration sample
CASE = 128  # and of a parity case
SOURCE = ("model", "layers", "profile", "budget", "calibration", "parity")


def write_samples(path: Path, tokens: int, each: int, seed: int) -> None:
    """A set of at least `tokens` tokens in prompts of at least `each`, words of the tokenizer's vocabulary."""
    tokenizer = Tokenizer.from_file(str(EMBEDDED_MODEL / "tokenizer.json"))
    words = sorted(word for word in tokenizer.get_vocab() if word.isascii() and word.isalpha() and len(word) > 1)
    draw, lines = np.random.default_rng(seed), list[str]()
    while tokens > 0:
        text = str(draw.choice(words))
        while len(ids := tokenizer.encode(text, add_special_tokens=False).ids) < each:
            text += f" {draw.choice(words)}"
        tokens -= len(ids)
        lines.append(json.dumps({"prompt": text, "answer": "yes"}) + "\n")
    path.write_text("".join(lines))


def measure(folder: Path, model: str, layers: int, profile: str, options: argparse.Namespace) -> Iterator[dict]:
    """Plan and build one source in `folder`; gives a row per stage, and one of the whole."""
    url = f"synthetic://{model}?layers={layers}"
    (folder / "build.yaml").write_text(BUILD.format(url=url, profile=profile, memory=options.memory))
    write_samples(folder / "calibration.jsonl", options.calibration, SAMPLE, 0)
    write_samples(folder / "cases.jsonl", options.parity, CASE, 1)
    planned = json.loads(arriero(folder, "plan", "build.yaml", "--json"))
    started = time.monotonic()
    # random weights fail thresholds (1); what the stages took stands all the same
    arriero(folder, "build", "build.yaml", allowed=(0, 1))
    seconds = time.monotonic() - started
    keys = stage_keys(folder)
    source = {"model": model, "layers": layers, "profile": profile, "budget": options.memory}
    source |= {"calibration": options.calibration, "parity": options.parity, "processor": describe_processor()}
    total = 0.0
    for stage in planned["stages"]:
        record = stage_record(folder / "bundles", stage["name"], keys[stage["name"]])
        total += record["processor_seconds"]
        yield source | {
            "stage": stage["name"],
            "planned": stage["memory"],
            "measured": record["peak_memory_bytes"],
            "planned_seconds": stage["seconds"],
            "start": record["start_memory_bytes"],
            "seconds": record["seconds"],
            "processor_seconds": record["processor_seconds"],
            "disk": record["disk"],
        }
    yield source | {"stage": "build", "seconds": seconds, "processor_seconds": total}


def report(rows: list[dict[str, Any]]) -> None:
    """Print the rows, and per model, profile and stage the slopes over layers and over tokens."""
    head = f"{'model':9} {'layers':>6} {'profile':8} {'stage':22} {'planned':>8} {'peak GiB':>8} {'ratio':>6}"
    print(f"{head} {'CPU-s':>8} {'seconds':>8} {'planned':>8} {'disk GB':>8} {'MB/s':>7}")
    for row in rows:
        memory = [row.get(name, 0) / 2**30 for name in ("planned", "measured")]
        ratio = f"{memory[0] / memory[1]:6.2f}" if memory[1] else f"{'':6}"
        disk, seconds = row.get("disk", 0) / 1e9, [row["seconds"], row.get("planned_seconds", 0)]
        print(
            f"{row['model']:9} {row['layers']:6} {row['profile']:8} {row['stage']:22} {memory[0]:8.2f} "
            f"{memory[1]:8.2f} {ratio} {row['processor_seconds']:8.0f} {seconds[0]:8.0f} {seconds[1]:8.0f} "
            f"{disk:8.2f} {1000 * disk / max(seconds[0], 0.001):7.0f}"
        )
    by_layers = _series(
        rows, lambda row: row["layers"], lambda row: (row["profile"], row["budget"], row["calibration"], row["parity"])
    )
    for (model, stage, (profile, budget, *tokens)), points in by_layers.items():
        if len(points) > 1:
            slope, base = np.polyfit([*points], [*points.values()], 1)
            layers = released_config(model)["text_config"]["num_hidden_layers"]
            of = f"{model} {profile} {stage} ({budget}, {tokens[0]} and {tokens[1]} tokens)"
            whole = f"extrapolated to {layers} layers {(base + slope * layers) / 3600:.2f} CPU-h"
            print(f"{of}: {base:.0f} + {slope:.1f} CPU-s a layer, {whole}")
    by_tokens = _series(
        rows,
        lambda row: (row["calibration"], row["parity"]),
        lambda row: (row["profile"], row["budget"], row["layers"]),
    )
    for (model, stage, (profile, budget, layers)), points in by_tokens.items():
        if len(points) > 1:
            counts = [tokens[0 if stage == "calibrate" else 1] / 1000 for tokens in points]
            slope, base = np.polyfit(counts, [*points.values()], 1)
            print(f"{model}:{layers} {profile} {stage} ({budget}): {base:.0f} + {slope:.1f} CPU-s a thousand tokens")


def _series(
    rows: list[dict[str, Any]], by: Callable[[dict], Any], alike: Callable[[dict], tuple]
) -> dict[tuple, dict[Any, float]]:
    """CPU-seconds of each (model, stage, what is `alike`) over what a row is sorted `by`."""
    found: dict[tuple, dict[Any, float]] = {}
    for row in rows:
        found.setdefault((row["model"], row["stage"], alike(row)), {})[by(row)] = row["processor_seconds"]
    return found


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder for bundles, emptied source by source, and stages.jsonl")
    parser.add_argument("--models", nargs="*", default=[], help="NAME:LAYERS, such as scout:2")
    parser.add_argument("--profiles", nargs="*", default=["int8", "int4"])
    parser.add_argument("--memory", default="6GiB", help="budgets.host_memory")
    parser.add_argument("--calibration", type=int, default=16384, help="tokens")
    parser.add_argument("--parity", type=int, default=4096, help="tokens")
    parser.add_argument("--report", action="store_true", help="print what was measured")
    options = parser.parse_args()
    notes = options.folder / "stages.jsonl"
    options.folder.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []
    for source in options.models:
        model, _, layers = source.partition(":")
        for profile in options.profiles:
            wanted = (model, int(layers), profile, options.memory, options.calibration, options.parity)
            if any(wanted == tuple(row[name] for name in SOURCE) for row in rows):
                continue
            folder = options.folder / f"{model}-{layers}-{profile}"
            folder.mkdir(exist_ok=True)  # a build that was cut off goes on
            measured = [*measure(folder, model, int(layers), profile, options)]
            with notes.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in measured)
            rows += measured
            shutil.rmtree(folder)
    if options.report:
        report(rows)


if __name__ == "__main__":
    main()
