"""One expert layer on the device, of random numbers, and what some of its outputs must be.

Weights are random bits throughout, as power and clocks depend on them; every expert has its own. Of each stack, some
outputs' weights are known to the host as well, so that a timed launch can be held to float64.
Legend: T tokens, E experts, H hidden, F expert width, N output and K input features, S sampled outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import checkout  # noqa: F401
import ml_dtypes
import numpy as np
from cuda_driver import CudaGpu, Launch

from arriero.export.compile.cuda.launch import BLOCKED, Kernel, Op
from arriero.graphs.stored.expert_plugins import BITS, INNER_SCALES
from arriero.graphs.stored.mma_layout import pack_byte_lanes, pack_int4_lanes, row_words
from arriero.profiles.quantize import Quantized

BLOCK = 128
SAMPLED = 32
SHIFT = 4096  # bytes by which the next expert's random bits are moved
NUMBERS = {"exact": np.dtype(np.float16), "int8": np.dtype(np.int8), "fp8": np.dtype(ml_dtypes.float8_e4m3fn)}


INNER_SCALE = INNER_SCALES["F16"]  # of what lies between both operators, unless it is codes


@dataclass(frozen=True)
class Sizes:
    """Of a layer, and of the largest batch."""

    hidden: int
    ffn: int
    experts: int
    tokens: int


@dataclass(frozen=True)
class DeviceStack:
    """A stack [E, N, row] and its scales at their addresses; `values` f64 [E, S, K] of some of its rows."""

    weights: int
    scales: int
    values: np.ndarray


class Layer:
    """Weights, inputs and results of one expert layer on the device."""

    def __init__(self, gpu: CudaGpu, form: str, sizes: Sizes) -> None:
        """Random numbers of `form`; results are of the size of the inputs."""
        self.form, self.sizes, self._gpu = form, sizes, gpu
        self.block = BLOCK if form == BLOCKED else 0
        self._draw = np.random.default_rng(0)
        hidden, ffn = sizes.hidden, sizes.ffn
        # columns of the results
        self._sampled = {"gate_up": self._draw.choice(ffn, SAMPLED // 2, replace=False)}
        self._sampled["down"] = self._draw.choice(hidden, SAMPLED, replace=False)
        self.x, self.inner = self._inputs(hidden), self._inputs(ffn)
        self.score = self._draw.uniform(0.1, 0.9, (sizes.tokens, 1)).astype(np.float32)
        self.gate_up = self._stack(2 * ffn, hidden, self._gate_up_rows(), self.x)
        self.down = self._stack(hidden, ffn, self._sampled["down"], self.inner)
        self._inputs_at = {"gate_up": gpu.upload(self.x), "down": gpu.upload(self.inner)}
        self._score_at = gpu.upload(self.score)
        self._results = {"gate_up": gpu.allocate(self.inner.nbytes), "down": gpu.allocate(self.x.nbytes)}

    def _inputs(self, features: int) -> np.ndarray:
        """Float16 [T, K]: codes beside eight bits."""
        shape = self.sizes.tokens, features
        if self.form == "int8":
            return self._draw.integers(-127, 128, shape).astype(np.float16)
        values = self._draw.standard_normal(shape, dtype=np.float32)
        if self.form == "fp8":
            values = (64 * values).astype(NUMBERS["fp8"])
        return values.astype(np.float16)

    def _gate_up_rows(self) -> np.ndarray:
        """Where the sampled gates and ups are stored."""
        columns = self._sampled["gate_up"]
        return np.concatenate([columns, columns + self.sizes.ffn])

    def _stack(self, outputs: int, features: int, rows: np.ndarray, inputs: np.ndarray) -> DeviceStack:
        """Random weights [E, N, row]."""
        experts, draw = self.sizes.experts, self._draw
        blocks = features // self.block if self.block else 1
        bulk = self._bits(outputs, features)
        address = self._gpu.allocate(experts * bulk.nbytes)
        kept = []
        for expert in range(experts):
            one = np.roll(bulk.reshape(-1), SHIFT * expert).reshape(bulk.shape)
            known, numbers = self._known(features)
            one[rows] = known
            kept.append(numbers)
            self._gpu.upload(one, address + expert * one.nbytes)
        values = np.stack(kept)
        scales = np.ones(1, np.float32)  # of exact weights nothing reads it
        if self.form != "exact":
            size = 1 / (values.std() * inputs.astype(np.float32).std() * features**0.5)
            scales = (size * draw.uniform(0.5, 1.5, (experts, outputs, blocks))).astype(np.float32)
            values *= np.repeat(scales[:, rows], features // blocks, -1)
        return DeviceStack(address, self._gpu.upload(scales), values)

    def _bits(self, outputs: int, features: int) -> np.ndarray:
        """Stored rows u8 [N, row bytes] of any numbers that the form has."""
        if self.form == "exact":
            values = self._draw.standard_normal((outputs, features), dtype=np.float32) / np.float32(features**0.5)
            return values.astype(np.float16).view(np.uint8)
        bits = self._draw.integers(0, 256, (outputs, 4 * row_words(BITS[self.form], features)), np.uint8)
        if self.form == "fp8":
            bits[bits & 0x7F == 0x7F] ^= 1  # not-a-number
        return bits

    def _known(self, features: int) -> tuple[np.ndarray, np.ndarray]:
        """Stored rows u8 [S, row bytes], and the float64 numbers [S, K] that they are."""
        if self.form == BLOCKED:
            codes = self._draw.integers(0, 256, (SAMPLED, features // 2), np.uint8)
            packed = pack_int4_lanes(Quantized(codes, np.ones(1, np.float32), 4, BLOCK))
            return packed.view(np.uint8), np.stack([codes & 15, codes >> 4], -1).reshape(SAMPLED, -1) - 8.0
        stored = self._bits(SAMPLED, features)
        if self.form == "exact":
            return stored, stored.view(NUMBERS["exact"]).astype(np.float64)
        codes = stored[:, :features]
        return pack_byte_lanes(codes).view(np.uint8), codes.view(NUMBERS[self.form]).astype(np.float64)

    def bytes_read(self, op: Op, routed: int) -> int:
        """Bytes of the weights and scales of `routed` experts."""
        outputs, features = self._shape(op)
        scales = 0 if self.form == "exact" else 4 * outputs * (features // self.block if self.block else 1)
        return routed * (outputs * features * BITS.get(self.form, 16) // 8 + scales)

    def operations(self, op: Op, tokens: int) -> int:
        """Multiplications and additions of `tokens`."""
        outputs, features = self._shape(op)
        return 2 * tokens * outputs * features

    def _shape(self, op: Op) -> tuple[int, int]:
        hidden, ffn = self.sizes.hidden, self.sizes.ffn
        return (2 * ffn, hidden) if op == "gate_up" else (hidden, ffn)

    def prepare(self, kernel: Kernel, ids_at: int, tokens: int) -> Launch:
        """A launch for the first `tokens` tokens, whose experts are at `ids_at`."""
        stack = self.gate_up if kernel.op == "gate_up" else self.down
        scores = [self._score_at] if kernel.op == "gate_up" else []
        addresses = [self._inputs_at[kernel.op], ids_at, *scores, stack.weights, stack.scales]
        scalars = {"tokens": tokens, "choices": 1, "experts": self.sizes.experts, "block": self.block}
        sizes = {**scalars, "hidden": self.sizes.hidden, "ffn": self.sizes.ffn}
        return self._gpu.prepare_kernel(kernel, addresses, sizes, self._results[kernel.op])

    def poison(self, op: Op, tokens: int, bits: int) -> None:
        """Fill the result with a pattern."""
        width = self.sizes.ffn if op == "gate_up" else self.sizes.hidden
        self._gpu.upload(np.full((tokens, width), bits, np.uint16), self._results[op])

    def sampled(self, op: Op, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The result's sampled outputs float16 [T, S or S/2], and what they must be, of tokens of the experts `ids`."""
        tokens, width = len(ids), self.sizes.ffn if op == "gate_up" else self.sizes.hidden
        result = np.empty((tokens, width), np.float16)
        self._gpu.download(self._results[op], result)
        if op == "down":
            inner = self.inner[:tokens].astype(np.float64) / (1.0 if self.form in ("int8", "fp8") else INNER_SCALE)
            expected = [self.down.values[expert] @ token for expert, token in zip(ids, inner, strict=True)]
        else:
            expected = []
            scaled = self.x[:tokens].astype(np.float64) * self.score[:tokens]
            for expert, token in zip(ids, scaled, strict=True):
                gate, up = np.split(self.gate_up.values[expert] @ token, 2)
                expected.append(gate / (1 + np.exp(-gate)) * up * INNER_SCALE)
        return result[:, self._sampled[op]], np.stack(expected)

    def release(self) -> None:
        """Give the memory back."""
        stacks = (address for stack in (self.gate_up, self.down) for address in (stack.weights, stack.scales))
        for address in [*stacks, *self._inputs_at.values(), self._score_at, *self._results.values()]:
            self._gpu.free(address)
