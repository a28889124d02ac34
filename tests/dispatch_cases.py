"""Cases of the expert dispatch for the CUDA kernels, and what they must give, in float64 numpy from the definition.

Legend: T tokens, k experts per token, E experts, H hidden, F expert width, N output and K input features.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from arriero.profiles.float8 import dequantize_float8, quantize_float8
from arriero.profiles.lanes import pack_float8_lanes, pack_lanes
from arriero.profiles.quantize import dequantize, quantize

TYPES = {"f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True)
class Matrices:
    """A stack as the kernels read it, and the float64 values [E, N, K] that it stands for."""

    stored: np.ndarray
    scales: np.ndarray
    values: np.ndarray


def store(weight: np.ndarray, form: str, activation: str, block: int) -> Matrices:
    """Store float32 [E, N, K]."""
    if form == "exact":
        rounded = weight.astype(TYPES[activation])
        return Matrices(rounded, np.full(1, np.nan, np.float32), rounded.astype(np.float64))
    if form == "fp8":
        floats = quantize_float8(weight, name="weight")
        return Matrices(pack_float8_lanes(floats), floats.scales, dequantize_float8(floats).astype(np.float64))
    bits = 4 if form == "int4" else 8
    integers = quantize(weight, bits=bits, block=block or weight.shape[-1], name="weight")
    scales = integers.scales if block else np.ascontiguousarray(integers.scales[..., 0])
    return Matrices(pack_lanes(integers), scales, dequantize(integers).astype(np.float64))


@dataclass(frozen=True)
class Case:
    """Inputs of both operators. `inner` is what Down reads: not GateUp's result, so that each is judged alone."""

    form: str
    activation: str
    block: int
    expert_id: np.ndarray
    score: np.ndarray
    x: np.ndarray
    inner: np.ndarray
    gate_up: Matrices
    down: Matrices

    @property
    def sizes(self) -> dict[str, int]:
        tokens, choices = self.expert_id.shape
        experts, hidden, ffn = self.down.values.shape
        return {
            "tokens": tokens,
            "choices": choices,
            "experts": experts,
            "hidden": hidden,
            "ffn": ffn,
            "block": self.block,
        }

    def arrays(self, op: str) -> list[np.ndarray]:
        if op == "gate_up":
            return [self.x, self.expert_id, self.score, self.gate_up.stored, self.gate_up.scales]
        return [self.inner, self.expert_id, self.down.stored, self.down.scales]

    def result(self, op: str) -> np.ndarray:
        """An array of the result's shape, of NaNs."""
        tokens, choices = self.expert_id.shape
        shape = self.inner.shape if op == "gate_up" else self.x.shape
        assert len(self.inner) == tokens * choices
        return np.full(shape, np.nan, self.x.dtype)

    def expected(self, op: str) -> np.ndarray:
        """Float64; NaN in a row of `inner` that no expert writes."""
        return self.gate_up_rows() if op == "gate_up" else self.down_rows()

    def experts(self) -> np.ndarray:
        """Of each row, its expert, or -1."""
        ids = self.expert_id.reshape(-1)
        return np.where((ids >= 0) & (ids < len(self.down.values)), ids, -1)

    def gate_up_rows(self) -> np.ndarray:
        rows = np.full(self.inner.shape, np.nan)
        for row, expert in enumerate(self.experts()):
            if expert >= 0:
                token = self.x[row // self.expert_id.shape[1]].astype(np.float64)
                scaled = token * float(self.score.reshape(-1)[row])
                gate, up = np.split(self.gate_up.values[expert] @ scaled, 2)
                rows[row] = gate / (1 + np.exp(-gate)) * up
        return rows

    def down_rows(self) -> np.ndarray:
        y = np.zeros(self.x.shape)
        for row, expert in enumerate(self.experts()):
            if expert >= 0:
                y[row // self.expert_id.shape[1]] += self.down.values[expert] @ self.inner[row].astype(np.float64)
        return y


def draw_case(
    ids: object, form: str, activation: str, *, hidden: int, ffn: int, experts: int, block: int = 0, seed: int = 0
) -> Case:
    """A case of the experts `ids` [T, k]. Scores are small, .02 to .4, so that scaling the result instead of the input
    gives something else; gates are of the size where SwiGLU bends."""
    draw = np.random.default_rng(seed)
    expert_id = np.ascontiguousarray(ids, dtype=np.int32)
    tokens, choices = expert_id.shape
    score = draw.uniform(0.02, 0.4, expert_id.shape).astype(np.float32)
    x = (4 * draw.standard_normal((tokens, hidden))).astype(TYPES[activation])
    inner = draw.standard_normal((tokens * choices, ffn)).astype(TYPES[activation])
    gate_up = 3 * draw.standard_normal((experts, 2 * ffn, hidden), dtype=np.float32) / hidden**0.5
    down = draw.standard_normal((experts, hidden, ffn), dtype=np.float32) / ffn**0.5
    stored = (store(weight, form, activation, block) for weight in (gate_up, down))
    return Case(form, activation, block, expert_id, score, x, inner, *stored)
