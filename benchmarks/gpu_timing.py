"""How long the kernels take on the GPU, beside the bandwidth that a kernel which only reads has in the same rounds.

Launches are replayed as a graph that is queued behind a copy, so that neither Python nor a launch's own cost is in
them; each of them starts at another expert, so that weights come from memory.
"""

from __future__ import annotations

import ctypes
import json
import math
import statistics
from argparse import Namespace
from collections.abc import Sequence
from itertools import product
from typing import Any

import checkout  # noqa: F401
import numpy as np
from cuda_driver import CudaGpu
from gpu_check import POISON, allowance, judge
from gpu_code import READ_PROBE
from gpu_layer import Layer, Sizes

from arriero.export.compile.cuda.launch import Kernel

READ = 1 << 30  # bytes, to measure bandwidth
LONG_ENOUGH = 2e-3  # seconds of replays that are timed at once
ACTIVATION = "f16"


def measure(gpu: CudaGpu, forms: Sequence[str], options: Namespace) -> list[dict[str, Any]]:
    """One row per form, operator, kernel and number of tokens."""
    probe = ReadProbe(gpu)
    rows = []
    for form in forms:
        sizes = Sizes(options.hidden, options.ffn, options.experts, max(options.tokens))
        layer = Layer(gpu, form, sizes)
        for tokens in options.tokens:
            turns = [(np.arange(tokens) + turn) % options.experts for turn in range(options.experts)]
            ids = [gpu.upload(turn.astype(np.int32)) for turn in turns]
            for op, shape in product(options.ops, options.shapes):
                kernel = Kernel(op, shape, ACTIVATION, form)
                graph = gpu.graph([layer.prepare(kernel, address, tokens) for address in ids])
                row: dict[str, Any] = {"kernel": kernel.name, "tokens": tokens}
                row.update(time_beside(gpu, graph, len(ids), probe, options.rounds))
                seconds, bandwidth = row["microseconds"] / 1e6, row["read_gb_s"] * 1e9
                read = layer.bytes_read(op, min(tokens, options.experts))
                row["of_read_bandwidth"] = round(read / seconds / bandwidth, 3)
                row["tflops"] = round(layer.operations(op, tokens) / seconds / 1e12, 2)
                layer.poison(op, tokens, POISON)
                gpu.replay(graph)
                row.update(judge(*layer.sampled(op, turns[-1]), allowance(ACTIVATION, form)))
                gpu.drop(graph)
                rows.append(row)
                print(json.dumps(row), flush=True)
            for address in ids:
                gpu.free(address)
        layer.release()
    probe.release()
    return rows


class ReadProbe:
    """Reads a gigabyte, and knows how long that takes."""

    def __init__(self, gpu: CudaGpu) -> None:
        """Of random bytes, as the weights are."""
        self._gpu, self._out = gpu, gpu.allocate(4)
        self._from = gpu.upload(np.random.default_rng(0).integers(0, 256, READ, np.uint8))
        values = [ctypes.c_uint64(self._from), ctypes.c_uint64(READ // 16), ctypes.c_uint64(self._out)]
        self._graph = gpu.graph([gpu.prepare(READ_PROBE, (8 * gpu.multiprocessors, 1), 256, values)])

    def bandwidth(self) -> float:
        """Bytes a second."""
        return READ / self._gpu.time(self._graph, 4)[0]

    def release(self) -> None:
        """Give the memory back."""
        self._gpu.drop(self._graph)
        for address in (self._from, self._out):
            self._gpu.free(address)


def time_beside(gpu: CudaGpu, graph: ctypes.c_void_p, launches: int, probe: ReadProbe, rounds: int) -> dict[str, Any]:
    """Of one launch of `graph`: median, best and worst time; the bandwidth and the clock of the same rounds."""
    once, _ = gpu.time(graph, 1)  # also warms up
    repeats = max(1, math.ceil(LONG_ENOUGH / once))
    times, clocks, bandwidths = [], [], []
    for _ in range(rounds):
        bandwidths.append(probe.bandwidth())
        seconds, clock = gpu.time(graph, repeats)
        times.append(seconds / launches)
        clocks.append(clock)
    return {**summary(times, clocks), "read_gb_s": round(statistics.median(bandwidths) / 1e9, 1)}


def summary(seconds: Sequence[float], clocks: Sequence[int | None]) -> dict[str, Any]:
    """Of all rounds: median, best and worst time, and the SM clock."""
    known = [clock for clock in clocks if clock is not None]
    return {
        "microseconds": round(statistics.median(seconds) * 1e6, 3),
        "best": round(min(seconds) * 1e6, 3),
        "worst": round(max(seconds) * 1e6, 3),
        "sm_mhz": statistics.median(known) if len(known) == len(clocks) else None,
    }


def over_runs(runs: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The last run's rows, each with the times of all runs and how far apart they lie, of the shortest."""
    rows = []
    for same in zip(*runs, strict=True):
        times = [row["microseconds"] for row in same if "microseconds" in row]  # a peer may have been refused
        spread = {"runs": times, "spread": round(max(times) / min(times) - 1, 4)} if times else {}
        rows.append({**same[-1], **spread})
    return rows
