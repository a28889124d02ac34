"""The CUDA kernels of the expert dispatch on a GPU: first checked, then timed.

    python benchmarks/gpu_kernels.py [--check] [--tokens 1 4 16 64 512 2048] [--forms exact int8 fp8 int4 ...]

Checked against float64 numpy at odd shapes (--check does only this). Timed on Scout's shapes (hidden 5,120, experts of
8,192, 16 of them, top-1) beside the copy bandwidth measured in the same rounds and, where torch with CUDA is installed,
beside cuBLAS on the same tokens in 16-bit weights. int8 and fp8 multiply eight bits by eight; rounding their inputs to
codes, which standard operators do, is not in the times. Forms that the GPU has no products for are left out. Decode's
experts change from launch to launch, so that weights come from memory. Writes a JSON file with date and hardware into
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from cuda_driver import CudaGpu, open_driver

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from arriero.export.compile.cuda.build_cuda_kernels import kernels_for  # noqa: E402
from arriero.export.compile.cuda.launch import BITS, BLOCKED, FORMS, OPS, SHAPES, Kernel  # noqa: E402
from arriero.graphs.stored.mma_layout import row_words  # noqa: E402
from tests.dispatch_cases import draw_case  # noqa: E402

RESULTS = Path(__file__).parent / "results"
BLOCK = 128
COPIED = 1 << 30  # bytes, to measure bandwidth
# of the largest result: its rounding, and sums in float32
WORST = {"f16": 2.0**-11 + 1e-5, "bf16": 2.0**-8 + 1e-5}
# form, block, hidden, expert width
CHECKED = [
    ("exact", 0, 80, 48),
    ("int8", 0, 80, 48),
    ("fp8", 0, 208, 48),
    ("int4", 32, 160, 96),
    ("int4", 128, 256, 128),
]


def check(gpu: Any, forms: Sequence[str]) -> list[dict[str, Any]]:
    """One row per kernel and routing: the largest error, of the largest value, and whether it is small enough."""
    routes = {
        "spread": np.random.default_rng(1).integers(0, 4, (75, 1)),
        "top-2": np.random.default_rng(2).permuted(np.tile(np.arange(4), (11, 1)), axis=1)[:, :2],
        "all to one": np.full((70, 1), 3),
        "one token": np.array([[2]]),
    }
    rows = []
    for (form, block, hidden, ffn), (route, ids) in product(CHECKED, routes.items()):
        for activation in FORMS[form] if form in forms else ():
            case = draw_case(ids, form, activation, hidden=hidden, ffn=ffn, experts=5, block=block)
            for op, shape in product(OPS, SHAPES):
                kernel, result = Kernel(op, shape, activation, form), case.result(op)
                gpu.launch(kernel, case.arrays(op), case.sizes, result)
                expected = case.expected(op)
                error = float(np.abs(result.astype(np.float64) - expected).max() / np.abs(expected).max())
                right = error < WORST[activation]  # which not-a-number is not
                rows.append({"kernel": kernel.name, "block": block, "route": route, "error": error, "right": right})
    return rows


class Layer:
    """Weights of one expert layer on the device, of any values, and its buffers."""

    def __init__(self, gpu: CudaGpu, form: str, hidden: int, ffn: int, experts: int, tokens: int) -> None:
        """Every expert has the same values; where they lie is what matters to speed."""
        self.form, self.hidden, self.ffn, self.experts = form, hidden, ffn, experts
        self.block = BLOCK if form == BLOCKED else 0
        draw = np.random.default_rng(0)
        self.addresses: dict[str, int] = {}
        for name, outputs, features in (("gate_up", 2 * ffn, hidden), ("down", hidden, ffn)):
            row = 2 * features if form == "exact" else 4 * row_words(BITS[form], features)
            one = draw.integers(0, 0x38, outputs * row, np.uint8)  # small positive numbers in every form
            self.addresses[name] = gpu.allocate(experts * one.nbytes)
            for expert in range(experts):
                gpu.upload(one, self.addresses[name] + expert * one.nbytes)
            scales = np.full(experts * outputs * (features // self.block if self.block else 1), 1e-3, np.float32)
            self.addresses[f"{name}_scales"] = gpu.upload(scales)
        self.addresses["x"] = gpu.upload(draw.integers(-8, 9, (tokens, hidden)).astype(np.float16))  # codes, too
        self.addresses["score"] = gpu.upload(np.full(tokens, 0.25, np.float32))
        self.addresses["inner"] = gpu.upload(np.zeros((tokens, ffn), np.float16))
        self.addresses["y"] = gpu.allocate(2 * tokens * hidden)

    def bytes_read(self, op: str, routed: int) -> int:
        """Bytes of the weights and scales of `routed` experts."""
        outputs, features = (2 * self.ffn, self.hidden) if op == "gate_up" else (self.hidden, self.ffn)
        scales = 0 if self.form == "exact" else 4 * outputs * (features // self.block if self.block else 1)
        return routed * (outputs * features * BITS.get(self.form, 16) // 8 + scales)

    def arguments(self, op: str, expert_id: int) -> tuple[list[int], int]:
        """Addresses of the inputs, and of the result."""
        a = self.addresses
        if op == "gate_up":
            return [a["x"], expert_id, a["score"], a["gate_up"], a["gate_up_scales"]], a["inner"]
        return [a["inner"], expert_id, a["down"], a["down_scales"]], a["y"]

    def sizes(self, tokens: int) -> dict[str, int]:
        """The scalars of a launch."""
        sizes = {"tokens": tokens, "choices": 1, "experts": self.experts, "hidden": self.hidden, "ffn": self.ffn}
        return {**sizes, "block": self.block}

    def release(self, gpu: CudaGpu) -> None:
        """Give the memory back."""
        for address in self.addresses.values():
            gpu.free(address)


def start_each(gpu: CudaGpu, layer: Layer, kernel: Kernel, turns: list[int], tokens: int) -> None:
    """One launch for each of the arrays of experts in `turns`."""
    for turn in turns:
        addresses, result = layer.arguments(kernel.op, turn)
        gpu.start(kernel, addresses, layer.sizes(tokens), result)


def measure(gpu: CudaGpu, forms: Sequence[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per form, operator, kernel and number of tokens."""
    source, target = gpu.allocate(COPIED), gpu.allocate(COPIED)
    rows = []
    for form in forms:
        layer = Layer(gpu, form, options.hidden, options.ffn, options.experts, max(options.tokens))
        for tokens in options.tokens:
            # each launch starts at another expert
            turns = [
                gpu.upload(((np.arange(tokens) + turn) % options.experts).astype(np.int32))
                for turn in range(options.experts)
            ]
            for op, shape in product(OPS, SHAPES):
                kernel = Kernel(op, shape, "f16", form)

                run = partial(start_each, gpu, layer, kernel, turns, tokens)
                run()
                times, copies = [], []
                for _ in range(options.rounds):
                    copies.append(2 * COPIED / gpu.seconds(lambda: gpu.copy(target, source, COPIED)))
                    times.append(gpu.seconds(run) / len(turns))
                seconds, bandwidth = statistics.median(times), statistics.median(copies)
                read = layer.bytes_read(op, min(tokens, options.experts))
                outputs = 2 * options.ffn * options.hidden if op == "gate_up" else options.ffn * options.hidden
                rows.append(
                    {
                        "kernel": kernel.name,
                        "tokens": tokens,
                        "microseconds": round(seconds * 1e6, 2),
                        "best": round(min(times) * 1e6, 2),
                        "of_copy_bandwidth": round(read / seconds / bandwidth, 3),
                        "copy_gb_s": round(bandwidth / 1e9),
                        "tflops": round(2 * tokens * outputs / seconds / 1e12, 2),
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
            for turn in turns:
                gpu.free(turn)
        layer.release(gpu)
    for address in (source, target):
        gpu.free(address)
    return rows


def measure_peer(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The same two products by torch, an expert at a time, in 16-bit weights; nothing without torch's CUDA build."""
    try:
        import torch
    except ImportError:
        return []
    if not torch.cuda.is_available():
        return []
    shape = (options.experts, options.hidden, 2 * options.ffn)
    gate_up = torch.full(shape, 1e-3, dtype=torch.float16, device="cuda")
    down = torch.full((options.experts, options.ffn, options.hidden), 1e-3, dtype=torch.float16, device="cuda")
    rows = []
    for tokens in options.tokens:
        x = torch.randn(tokens, options.hidden, dtype=torch.float16, device="cuda")
        inner = torch.randn(tokens, options.ffn, dtype=torch.float16, device="cuda")

        def products(op: str, first: int, tokens: int = tokens, x: Any = x, inner: Any = inner) -> None:
            for group in range(min(tokens, options.experts)):
                expert = (group + first) % options.experts
                if op == "down":
                    torch.matmul(inner[group :: options.experts], down[expert])
                    continue
                both = torch.matmul(x[group :: options.experts] * 0.25, gate_up[expert])
                gate, up = both.chunk(2, dim=-1)
                torch.nn.functional.silu(gate).mul_(up)

        for op in OPS:
            times = []
            for attempt in range(options.rounds + 1):
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                for first in range(options.experts):
                    products(op, first)
                end.record()
                end.synchronize()
                if attempt:
                    times.append(begin.elapsed_time(end) * 1000 / options.experts)
            row = {"torch": torch.__version__, "op": op, "tokens": tokens}
            rows.append({**row, "microseconds": round(statistics.median(times), 2), "best": round(min(times), 2)})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="check only; nothing is timed or written")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 512, 2048])
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    parser.add_argument("--hidden", type=int, default=5120)
    parser.add_argument("--ffn", type=int, default=8192)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None, open_library: Callable[[], Any] = open_driver) -> int:
    """Check and measure; 1 if a kernel computes something else."""
    options = parse(arguments)
    gpu = CudaGpu(open_library())
    known = {kernel.form for kernel in kernels_for(gpu.architecture)}
    forms = [form for form in options.forms if form in known]
    checked = check(gpu, forms)
    wrong = [row for row in checked if not row["right"]]
    worst = max((row["error"] for row in checked), default=0.0)
    print(
        f"{gpu.name}, {gpu.architecture}: {len(checked) - len(wrong)} of {len(checked)} right, worst error {worst:.1e}"
    )
    for row in wrong:
        print(json.dumps(row))
    if wrong or options.check:
        return 1 if wrong else 0
    now = datetime.datetime.now(datetime.UTC)
    report = {
        "date": now.isoformat(timespec="seconds"),
        "hardware": {"gpu": gpu.name, "architecture": gpu.architecture, "driver_cuda": gpu.driver_version},
        "shape": {"hidden": options.hidden, "ffn": options.ffn, "experts": options.experts, "choices": 1},
        "rounds": options.rounds,
        "checked": checked,
        "kernels": measure(gpu, forms, options),
        "peer": measure_peer(options),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"gpu_kernels-{gpu.architecture}-{now:%Y%m%d-%H%M%S}.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
