"""How near the CPU kernels come to what the machine can do: read bandwidth in decode, peak arithmetic in prefill.

    python benchmarks/kernels.py [--threads 1] [--hidden 2048] [--ffn 4096] [--rounds 7]

Every round measures the roofline (the sum of a buffer far beyond the cache; the densest multiply-add loop) right
before each kernel, in one process, with one thread in its own CPU time, so that a busy machine slows both alike.
Experts are cycled, so that their weights come from memory. Shown are the best and the median of the rounds, and the
median of the rounds' ratios. The roofline is one thread's: with more threads a ratio is per thread's roofline.
"""

from __future__ import annotations

import argparse
import ctypes
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from roofline import build_probe, read_sum

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:  # a script's own folder is there, and the tests' helpers are not in it
    sys.path.insert(0, str(ROOT))

from arriero.export.compile.build_kernels import build_kernels, link_shared  # noqa: E402
from tests.call_kernels import Kernels, Weight, pack_experts  # noqa: E402

COLD_BYTES = 600_000_000  # beyond the largest cache we have met, 260 MB
FORMATS_MEASURED = {
    "int8_f16": (32, 128),  # with scales in float16; those of some checkpoints need float32
    "int4_f16": (32, 64, 128),
    "grid4_f16": (32, 128),
    "grid3_f16": (64,),
    "grid2_f16": (64,),
    "int4": (32,),
    "e4m3": (0,),
    "bf16": (0,),
    "f32": (0,),
}
BYTES = {  # of a weight, at most
    "int8_f16": 1.0625,
    "int4_f16": 0.5625,
    "grid4_f16": 0.5625,
    "grid3_f16": 0.40625,
    "grid2_f16": 0.28125,
    "int4": 0.625,
    "e4m3": 1.0,
    "bf16": 2.0,
    "f32": 4.0,
}


def random_weight(draw: np.random.Generator, form: str, block: int, experts: int, outputs: int, inputs: int) -> Weight:
    """Weights of any value that is a number: `outputs` must be a multiple of 16."""
    if form in ("f32", "bf16"):
        data = np.full((experts, inputs, outputs), 0.01, np.float32)
        return Weight(form, data if form == "f32" else (data.view(np.uint32) >> 16).astype(np.uint16))
    bits = int(form.removesuffix("_f16")[-1]) if form.startswith(("int", "grid")) else 8
    size = outputs * inputs * bits // 8
    high = 120 if form == "e4m3" else 256
    data = draw.integers(0, high, (experts, size), np.uint8)
    blocks = inputs // block if block else 1
    scales = np.full((experts, outputs * blocks), 1e-4, np.float16 if form.endswith("_f16") else np.float32)
    return Weight(form, data, scales, block)


def nbytes(weight: Weight) -> int:
    """Bytes that one expert's weight and scales take."""
    return (weight.data.nbytes + (weight.scales.nbytes if weight.scales is not None else 0)) // len(weight.data)


class Meter:
    """Measures in turns with a roofline, and prints a line for each kernel."""

    def __init__(self, rounds: int, threads: int) -> None:
        self.rounds = rounds
        # with one thread its own time, which a neighbour on the core does not add to
        self.clock = time.thread_time if threads == 1 else time.perf_counter

    def seconds(self, run: Callable[[], Any]) -> float:
        """Time one run."""
        start = self.clock()
        run()
        return self.clock() - start

    def compare(self, label: str, unit: str, work: float, run: Callable[[], Any], roof: Callable[[], float]) -> None:
        """`work` in units of 1e9 per `run`; `roof()` gives the roofline's rate."""
        run()
        rates, ratios, roofs = [], [], []
        for _ in range(self.rounds):
            roofs.append(roof())
            rates.append(work / self.seconds(run) / 1e9)
            ratios.append(rates[-1] / roofs[-1])
        print(
            f"{label:34} best {max(rates):7.1f}  median {statistics.median(rates):7.1f} {unit}   "
            f"roofline {statistics.median(roofs):7.1f}   ratio {statistics.median(ratios):.2f}",
            flush=True,
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--ffn", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--level", help="an instruction set, instead of the best that this CPU has")
    parser.add_argument("--only", default="", help="measure only what has this in its label")
    parser.add_argument("--library", type=Path, help="a shared library that was linked before")
    options = parser.parse_args()
    machine = platform.machine()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        library = options.library or folder / "kernels.so"
        if options.library is None:
            build_kernels(machine, folder / "kernels.o")
            link_shared(folder / "kernels.o", library)
        measure(Kernels(library, options.threads), build_probe(folder), options)


class Bench:
    """The kernels, the rooflines and the drawing of weights."""

    def __init__(self, kernels: Kernels, probe: ctypes.CDLL, options: argparse.Namespace) -> None:
        self.kernels, self.probe, self.options = kernels, probe, options
        self.meter, self.draw = Meter(options.rounds, options.threads), np.random.default_rng(0)
        self.big = self.draw.integers(0, 2**60, COLD_BYTES // 8, np.uint64)

    def read(self) -> float:
        """GB/s of summing a large buffer."""
        return self.big.nbytes / self.meter.seconds(lambda: read_sum(self.probe, self.big)) / 1e9

    def peak(self, function: Callable[..., int]) -> float:
        """GOP/s of a loop of nothing but multiply-adds."""
        done: list[int] = []
        seconds = self.meter.seconds(lambda: done.append(function(ctypes.c_int64(10_000_000))))
        return done[0] / seconds / 1e9

    def experts(self, form: str, block: int) -> None:
        """Decode of one token and prefill of 512 over 16 experts."""
        label = form + (f" block {block}" if block else "")
        if self.options.only not in f"{label} experts":
            return
        kernels, hidden, ffn = self.kernels, self.options.hidden, self.options.ffn
        count = max(16, COLD_BYTES // int(BYTES[form] * 3 * hidden * ffn))
        gate_up = random_weight(self.draw, form, block, count, 2 * ffn, hidden)
        down = random_weight(self.draw, form, block, count, hidden, ffn)
        packed = pack_experts(gate_up, down)
        x = self.draw.standard_normal((512, hidden), dtype=np.float32)
        score, spread = np.full((512, 1), 0.5, np.float32), (np.arange(512) % 16)[:, None]
        chosen = [np.full((1, 1), expert) for expert in range(count)]

        def decode() -> None:
            for expert in chosen:
                kernels.dispatch(x[:1], expert, score[:1], packed, ffn)

        def prefill() -> None:
            kernels.dispatch(x, spread, score, packed, ffn)

        function = self.probe.int8_dots if form.startswith(("int", "grid")) else self.probe.float_multiply_adds
        read = count * (nbytes(gate_up) + nbytes(down))
        self.meter.compare(f"experts, decode, {label}", "GB/s", read, decode, self.read)
        work = 512 * 6.0 * hidden * ffn
        self.meter.compare(f"experts, prefill, {label}", "GOP/s", work, prefill, lambda: self.peak(function))

    def attention_decode(self, form: str, heads: int, groups: int, size: int, depth: int) -> None:
        """One token at `depth`, over layers that together exceed the cache."""
        label = f"attention decode {form} {heads}/{groups}x{size} at {depth}"
        if self.options.only not in label:
            return
        shape, dtype = (2, 1, groups, depth, size), np.dtype(form)
        layers = max(2, COLD_BYTES // (int(np.prod(shape)) * dtype.itemsize))
        caches = [np.ones(shape, dtype) for _ in range(layers)]
        q, k = (self.draw.standard_normal((1, 1, n * size), dtype=np.float32) for n in (heads, groups))
        position, steps = np.array([[depth - 1]]), cache_steps(dtype, groups, size)

        def decode() -> None:
            for cache in caches:
                self.kernels.attention(q, k, k, position, cache[0], cache[1], 0, steps)

        self.meter.compare(label, "GB/s", sum(cache.nbytes for cache in caches), decode, self.read)

    def attention_prefill(self, form: str, heads: int, groups: int, size: int, length: int) -> None:
        """A prompt in pieces of 512 tokens from an empty cache; the work counts the keys that a query may see."""
        label = f"attention prefill {form} {heads}/{groups}x{size} of {length}"
        if self.options.only not in label:
            return
        q, k = (self.draw.standard_normal((1, 512, n * size), dtype=np.float32) for n in (heads, groups))
        cache, steps = np.zeros((2, 1, groups, length, size), form), cache_steps(np.dtype(form), groups, size)

        def prefill() -> None:
            for start in range(0, length, 512):
                positions = np.arange(start, start + 512)[None]
                self.kernels.attention(q, k, k, positions, cache[0], cache[1], 0, steps)

        work = 4.0 * heads * size * length * (length + 1) / 2
        self.meter.compare(label, "GOP/s", work, prefill, lambda: self.peak(self.probe.float_multiply_adds))


def cache_steps(dtype: np.dtype[Any], groups: int, size: int) -> tuple[Any, Any]:
    """Steps of an int8 cache's keys and values; None for other caches."""
    steps = np.full((groups, size), 0.03, np.float32) if dtype == np.int8 else None
    return steps, steps


def measure(kernels: Kernels, probe: ctypes.CDLL, options: argparse.Namespace) -> None:
    """Measure every kernel that `options.only` names."""
    if options.level and not kernels.use_level(options.level):
        raise SystemExit(f"this CPU has no {options.level}")
    sizes = f"hidden {options.hidden}, ffn {options.ffn}, {options.rounds} rounds"
    print(f"level {kernels.level()}, {options.threads} thread(s), {sizes}")
    bench = Bench(kernels, probe, options)
    for form, blocks in FORMATS_MEASURED.items():
        for block in blocks:
            bench.experts(form, block)
    for form in ("float32", "float16", "int8"):
        for shape in ((16, 4, 64), (40, 8, 128)):
            for depth in (2048, 8192, 131072):
                bench.attention_decode(form, *shape, depth)
            for length in (512, 4096):
                bench.attention_prefill(form, *shape, length)


if __name__ == "__main__":
    main()
