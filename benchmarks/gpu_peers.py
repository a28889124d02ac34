"""The same products by PyTorch, as fair as can be: random numbers, both layouts of weights, replayed as a graph.

    matmul      cuBLAS, an expert after the other, in float16
    grouped     torch._grouped_mm, all experts at once, in bfloat16
    scaled      torch._scaled_mm, an expert after the other, in E4M3; tokens of an expert rounded up to 16, as it asks

Layouts: "kn" is [E, K, N], input features first, "nk" is [E, N, K], output features first, read as its transpose.
Products alone are timed: neither scores nor SwiGLU, which ours do as well.
Legend: T tokens, E experts, K input and N output features.
"""

from __future__ import annotations

import json
import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

from gpu_timing import LONG_ENOUGH, summary
from sm_clock import SmClock

LAYOUTS = ("kn", "nk")
SCALED_ROWS = 16  # torch._scaled_mm's tokens come in multiples of it
Run = Callable[[int], list[Any]]  # the products where the first tokens' expert is this one, in the experts' order


def experts_tokens(tokens: int, experts: int, first: int) -> list[int]:
    """How many of `tokens`, dealt out one by one from the expert `first` on, each expert gets."""
    return [len(range((expert - first) % experts, tokens, experts)) for expert in range(experts)]


def stack(torch: Any, layout: str, experts: int, features: int, outputs: int, kind: Any, device: str) -> Any:
    """Random weights [E, K, N], which lie in memory as `layout` says."""
    shape = (experts, features, outputs) if layout == "kn" else (experts, outputs, features)
    weights = torch.empty(shape, dtype=kind, device=device)
    for expert in range(experts):  # one at a time, as float32 takes four times E4M3
        weights[expert] = torch.randn(shape[1:], device=device) / features**0.5
    return weights if layout == "kn" else weights.transpose(1, 2)


def matmul(torch: Any, x: Any, weights: Any) -> Run:
    """An expert after the other."""

    def run(first: int) -> list[Any]:
        sizes = experts_tokens(len(x), len(weights), first)
        return [torch.matmul(part, expert) for part, expert in zip(x.split(sizes), weights, strict=True) if len(part)]

    return run


def grouped(torch: Any, x: Any, weights: Any) -> Run:
    """All experts at once."""
    sizes = [experts_tokens(len(x), len(weights), first) for first in range(len(weights))]
    ends = torch.tensor(sizes, device=x.device).cumsum(1).to(torch.int32)

    def run(first: int) -> list[Any]:
        return [torch._grouped_mm(x, weights, offs=ends[first])]

    return run


def scaled(torch: Any, x: Any, weights: Any) -> Run:
    """An expert after the other, in E4M3; x must have rows to spare."""
    one = torch.ones((), device=x.device)
    tokens = len(x) - SCALED_ROWS * len(weights)

    def run(first: int) -> list[Any]:
        results, start = [], 0
        for expert, size in zip(weights, experts_tokens(tokens, len(weights), first), strict=True):
            if size:
                part = x[start : start + -(-size // SCALED_ROWS) * SCALED_ROWS]
                results.append(
                    torch._scaled_mm(part, expert, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)[:size]
                )
                start += size
        return results

    return run


PEERS: dict[str, tuple[Callable[[Any, Any, Any], Run], str, tuple[str, ...], int]] = {
    "matmul": (matmul, "float16", LAYOUTS, 0),
    "grouped": (grouped, "bfloat16", LAYOUTS, 0),
    "scaled": (scaled, "float8_e4m3fn", ("nk",), SCALED_ROWS),  # it takes no other layout
}


def measure_peers(options: Namespace) -> list[dict[str, Any]]:
    """One row per peer, layout, operator and number of tokens; none without torch's CUDA build."""
    try:
        import torch
    except ImportError:
        print("no torch: no peers", flush=True)
        return []
    if not torch.cuda.is_available():
        print("torch sees no GPU: no peers", flush=True)
        return []
    properties = torch.cuda.get_device_properties(0)
    clock = SmClock(f"{properties.pci_domain_id:08x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0")
    rows = []
    for (name, (make, kind, layouts, spare)), op in product(PEERS.items(), options.ops):
        features = options.hidden if op == "gate_up" else options.ffn
        outputs = 2 * options.ffn if op == "gate_up" else options.hidden
        dtype = getattr(torch, kind)
        for layout in layouts:
            weights = stack(torch, layout, options.experts, features, outputs, dtype, "cuda")
            for tokens in options.tokens:
                x = torch.randn(tokens + spare * options.experts, features, device="cuda").to(dtype)
                row = {"peer": name, "torch": torch.__version__, "layout": layout, "op": op, "tokens": tokens}
                try:
                    row.update(time_replayed(torch, make(torch, x, weights), options.experts, options.rounds, clock))
                    seconds = row["microseconds"] / 1e6
                    row["tflops"] = round(2 * tokens * features * outputs / seconds / 1e12, 2)
                except (RuntimeError, ValueError, AttributeError) as refusal:  # of this GPU, or this torch
                    row["refused"] = str(refusal).splitlines()[0]
                rows.append(row)
                print(json.dumps(row), flush=True)
            del weights
            torch.cuda.empty_cache()
    return rows


def time_replayed(torch: Any, run: Run, turns: int, rounds: int, clock: SmClock) -> dict[str, Any]:
    """Of `run` from each expert on, replayed as one graph behind a copy: median, best and worst, and the SM clock."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(0)  # what is chosen or allocated at the first call is not captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for first in range(turns):
            run(first)
    held = torch.empty(2, 1 << 30, dtype=torch.uint8, device="cuda")

    def seconds(times: int) -> tuple[float, int | None]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        held[0].copy_(held[1])
        begin.record()
        for _ in range(times):
            graph.replay()
        end.record()
        mhz = clock.read()
        end.synchronize()
        return begin.elapsed_time(end) / 1000 / times, mhz

    once, _ = seconds(1)
    repeats = max(1, math.ceil(LONG_ENOUGH / once))
    measured: Sequence[tuple[float, int | None]] = [seconds(repeats) for _ in range(rounds)]
    return summary([time / turns for time, _ in measured], [mhz for _, mhz in measured])
