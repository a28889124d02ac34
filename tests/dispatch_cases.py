"""Cases of the expert dispatch for the CUDA kernels, and what they must give, in float64 numpy from the definition.

Legend: T tokens, k experts per token, E experts, H hidden, F expert width, N output and K input features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from arriero.graphs.stored.expert_plugins import INNER_SCALES
from arriero.graphs.stored.mma_layout import pack_byte_lanes, pack_int4_lanes
from arriero.profiles.float8 import to_bits
from arriero.profiles.quantize import dequantize, quantize
from arriero.profiles.static_scales import InputScale, quantize_static, quantize_static_float8

TYPES = {"f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)


@dataclass(frozen=True)
class Matrices:
    """A stack as the kernels read it, and the numbers [E, N, K] multiplied: of eight bits, before the scales."""

    stored: np.ndarray
    scales: np.ndarray
    numbers: np.ndarray

    @property
    def values(self) -> np.ndarray:
        """What the stack stands for, float64."""
        wide = self.numbers.astype(np.float64)
        return wide * self.scales[..., None] if self.scales.ndim == 2 else wide


def store(
    weight: np.ndarray, inputs: np.ndarray, form: str, activation: str, block: int
) -> tuple[Matrices, np.ndarray]:
    """Store float32 [E, N, K], and what of float32 `inputs` [.., K] it is multiplied with: rounded, or codes."""
    if form == "exact":
        rounded = weight.astype(TYPES[activation])
        return Matrices(rounded, np.full(1, np.nan, np.float32), rounded), inputs.astype(TYPES[activation])
    if form == "int4":
        integers = quantize(weight, bits=4, block=block, name="weight")
        stack = Matrices(pack_int4_lanes(integers), integers.scales, dequantize(integers))
        return stack, inputs.astype(TYPES[activation])
    experts, _, features = weight.shape
    known = InputScale(np.ones((experts, features), np.float32), np.full((experts, 1), np.abs(inputs).max()))
    if form == "int8":
        static = quantize_static(weight, known, name="weight")
        codes = np.clip(np.rint(inputs * static.multiplier[0]), -127, 127)
        packed = static.packed ^ 0x80
        numbers = packed.view(np.int8)
    else:
        static = quantize_static_float8(weight, known, name="weight")
        codes = to_bits(inputs * static.multiplier[0]).view(FLOAT8)
        packed = static.bits
        numbers = packed.view(FLOAT8)
    return Matrices(pack_byte_lanes(packed), static.scales, numbers), codes.astype(np.float16)


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
        experts, hidden, ffn = self.down.numbers.shape
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
        return np.where((ids >= 0) & (ids < len(self.down.numbers)), ids, -1)

    @property
    def inner_scale(self) -> float:
        """What GateUp's results are multiplied with."""
        return INNER_SCALES[self.activation.upper()]

    def routed(self) -> Iterator[tuple[int, np.ndarray]]:
        """Each expert that has rows, and which."""
        experts = self.experts()
        for expert in np.unique(experts[experts >= 0]):
            yield int(expert), np.flatnonzero(experts == expert)

    def gate_up_rows(self) -> np.ndarray:
        rows, values = np.full(self.inner.shape, np.nan), self.gate_up.values
        scores = self.score.reshape(-1, 1).astype(np.float64)
        for expert, own in self.routed():
            scaled = self.x[own // self.expert_id.shape[1]].astype(np.float64) * scores[own]
            gate, up = np.split(scaled @ values[expert].T, 2, axis=-1)
            with np.errstate(over="ignore"):  # to infinity, and the quotient to the 0 that it is
                rows[own] = gate / (1 + np.exp(-gate)) * up * self.inner_scale
        return rows

    def down_rows(self) -> np.ndarray:
        y, values = np.zeros(self.x.shape), self.down.values
        scale = 1.0 if self.form in ("int8", "fp8") else self.inner_scale  # a code is what its scale says
        for expert, own in self.routed():
            outer = self.inner[own].astype(np.float64) @ values[expert].T / scale
            np.add.at(y, own // self.expert_id.shape[1], outer)  # a token may choose an expert twice
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
    x = 4 * draw.standard_normal((tokens, hidden), dtype=np.float32)
    inner = draw.standard_normal((tokens * choices, ffn), dtype=np.float32)
    gate_up = 3 * draw.standard_normal((experts, 2 * ffn, hidden), dtype=np.float32) / hidden**0.5
    down = draw.standard_normal((experts, hidden, ffn), dtype=np.float32) / ffn**0.5
    first, x_codes = store(gate_up, x, form, activation, block)
    second, inner_codes = store(down, inner, form, activation, block)
    return Case(form, activation, block, expert_id, score, x_codes, inner_codes, first, second)
