"""How long a picture of five tiles takes in the vision tower: of bundles, and of llama.cpp beside them, interleaved.

    python benchmarks/vision.py int8=bundles/vision/int8 exact=bundles/vision/exact
    python benchmarks/vision.py int8=.. --mtmd-cli llama-mtmd-cli --text text.gguf --mmproj BF16=mmproj-BF16.gguf

Every contender lives in a process of its own and answers one round at a time; the order turns from round to round. What
counts are ratios within a round: their median is printed. Of llama.cpp it is what `llama-mtmd-cli` logs of each tile,
which holds neither loading nor reading what follows; of a bundle the call of `session.vision`.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from contenders import Worker, in_turn, named
from PIL import Image
from rich.console import Console
from rich.table import Table

SIDE = 672  # two tiles of 336 across and two down, and a fifth that shows the whole
TILES = 5
LOGGED = re.compile(r"encoding done in (\d+) ms")


def draw_picture(path: Path) -> None:
    """Write a picture of seeded noise."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(path)


def serve(bundle: Path, picture: Path, threads: int) -> None:
    """The worker: opens the bundle, then answers each line with the seconds that the picture took."""
    from arriero import load

    session = load(bundle, threads)
    pixels = session.encode("What is this?", [np.asarray(Image.open(picture))]).pixel_values
    assert pixels is not None
    if len(pixels) != TILES:
        raise SystemExit(
            f"the picture is {len(pixels)} tiles to this bundle; expected {TILES}: build benchmarks/vision.yaml"
        )
    session.vision(pixels)
    print("true", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        session.vision(pixels)
        print(time.perf_counter() - start, flush=True)


def bundle(path: Path, picture: Path, threads: int) -> Callable[[], float]:
    """Give the seconds of a bundle in a worker process."""
    worker = Worker(__file__, "--worker", str(path), "--picture", str(picture), "--threads", str(threads))
    return lambda: float(worker.ask(None))


def llama_cpp(program: str, text: Path, mmproj: Path, picture: Path, threads: int) -> Callable[[], float]:
    """Give the seconds of llama.cpp's tower, in a process for each round."""
    command = [program, "-m", str(text), "--mmproj", str(mmproj), "--image", str(picture), "-t", str(threads)]

    def measure() -> float:
        options = ["-p", "What is this?", "-n", "1", "-c", "4096", "--no-warmup"]
        done = subprocess.run([*command, *options], check=True, capture_output=True, text=True)
        tiles = [int(milliseconds) for milliseconds in LOGGED.findall(done.stdout + done.stderr)]
        if len(tiles) != TILES:
            raise SystemExit(f"{program} logged {len(tiles)} tiles; expected {TILES}")
        return sum(tiles) / 1000

    return measure


def main() -> None:
    """Parse the command line, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="*", metavar="NAME=BUNDLE", help="bundles; the first contender is the base")
    parser.add_argument("--mtmd-cli", default="llama-mtmd-cli", help="llama.cpp's program")
    parser.add_argument("--text", type=Path, help="the model's decoder as a GGUF file, which the program needs")
    parser.add_argument("--mmproj", action="append", default=[], metavar="NAME=FILE", help="its tower as a GGUF file")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of every contender")
    parser.add_argument("--rounds", type=int, default=3, help="rounds")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--picture", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        serve(arguments.worker, arguments.picture, arguments.threads)
        return
    if not arguments.bundles or (arguments.mmproj and not arguments.text):
        parser.error("name at least one bundle, and --text beside --mmproj")
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "picture.png"
        draw_picture(picture)
        contenders = {}
        for name, path in named(arguments.bundles):
            contenders[name] = bundle(path, picture, arguments.threads)
        for name, path in named(arguments.mmproj):
            contenders[name] = llama_cpp(arguments.mtmd_cli, arguments.text, path, picture, arguments.threads)
        rounds: list[dict[str, float]] = []
        for number in range(arguments.rounds):
            rounds.append({name: contenders[name]() for name in in_turn(contenders, number)})
    base = next(iter(contenders))
    shown = Table(title=f"{TILES} tiles, {arguments.threads} threads, {len(rounds)} rounds")
    for column in ("", "seconds", f"÷ {base}", "lowest", "highest"):
        shown.add_column(column, justify="right" if column else "left")
    for name in contenders:
        ratios = [one[name] / one[base] for one in rounds]
        cells = (statistics.median(one[name] for one in rounds), statistics.median(ratios), min(ratios), max(ratios))
        shown.add_row(name, *(f"{cell:.2f}" for cell in cells))
    Console().print(shown)


if __name__ == "__main__":
    main()
