"""How one tensor may be stored and multiplied: the schemes that a profile chooses from, one frozen record each.

Legend: N output features, K input features, E experts. A matrix is [N, K], a stack of experts [E, K, N].
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, model_validator
from typing_extensions import override

from arriero.errors import ArrieroError
from arriero.profiles.grids import NORMAL_LEVELS, GridName
from arriero.profiles.quantize import check_block

Shape = tuple[int, ...]
HALF_BYTES = 2  # of a float16


class Record(BaseModel):
    """Data of a profile: nothing unknown, nothing changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class _Scheme(Record):
    """What every scheme can say of itself."""

    @property
    def label(self) -> str:
        """The scheme in the manifest's weight table; the bits of a value are the first number in it."""
        raise NotImplementedError

    @property
    def description(self) -> str:
        """The scheme in one phrase for people."""
        return self.label

    @property
    def dtype(self) -> str:
        """What the values are, in one word: f32, int4, fp8."""
        return self.label.split()[0]

    @property
    def calibrates(self) -> bool:
        """Whether its numbers come from activations, so that the build must see some."""
        return False

    @property
    def keeps_codes(self) -> bool:
        """Whether it holds a checkpoint's own codes, so that nothing is lost in it."""
        return False

    @property
    def codes(self) -> int:
        """How many int8 codes each activation is rounded to, where the kernels round them at all."""
        return 1

    def rtn_baseline(self) -> Self:
        """The same storage with every scale the largest magnitude of the weights: what calibration has to beat."""
        return self

    def stored_bytes(self, shape: Shape) -> int:
        """Bytes of a tensor of `shape` in a bundle, scales included."""
        raise NotImplementedError

    def calibrated_bytes(self, shape: Shape) -> int:
        """Bytes that calibration leaves for a tensor of `shape` between the stages."""
        return 0

    def check(self, shape: Shape, name: str) -> None:
        """Raise ArrieroError if tensor `name`, a matrix or a stack of experts, cannot be stored so."""


class Exact(_Scheme):
    """The tensor's values stay exact: stored as float32, or in the checkpoint's own dtype where a kernel reads it."""

    kind: Literal["exact"] = "exact"

    @property
    @override
    def label(self) -> str:
        return "exact"

    @property
    @override
    def dtype(self) -> str:
        return "f32"

    @override
    def stored_bytes(self, shape: Shape) -> int:
        return 4 * math.prod(shape)


class Half(_Scheme):
    """Weights and activations in 16-bit floats. float16 saturates nothing: what exceeds 65504 is infinite."""

    kind: Literal["half"]
    format: Literal["float16", "bfloat16"]

    @property
    @override
    def label(self) -> str:
        return {"float16": "f16", "bfloat16": "bf16"}[self.format]

    @property
    @override
    def description(self) -> str:
        return self.format

    @override
    def stored_bytes(self, shape: Shape) -> int:
        return 2 * math.prod(shape)


class IntBlock(_Scheme):
    """Block-wise symmetric integers along the input features, one scale per block.

    A scale is a number that float16 holds, but for the checkpoint's own, and is kept so where the kernels take it.

    `accuracy_level` is ONNX Runtime's: 4 rounds activations to int8 as well, 0 keeps them in float32. 2 is float16's: a
    matrix's activations are rounded in two steps, what the first leaves to int8 once more. `rounding` says how the
    integers are found: each value to its nearest, by GPTQ on the inputs that calibration saw, or `stored`: they are the
    checkpoint's own, with its scales. `grid` normal: 4, 3 or 2 bits that number levels, see `grids`.
    """

    kind: Literal["int_block"]
    bits: Literal[2, 3, 4, 8]
    block: Literal[16, 32, 64, 128, 256]
    accuracy_level: Literal[0, 2, 4]
    rounding: Literal["nearest", "gptq", "stored"] = "nearest"
    grid: GridName = "even"

    @model_validator(mode="after")
    def _has_levels(self) -> Self:
        if self.bits < 4 and self.grid == "even":
            raise ValueError(f"`bits: {self.bits}` needs `grid: normal`")
        if self.grid == "normal" and (self.bits not in NORMAL_LEVELS or self.rounding == "stored"):
            levels = ", ".join(map(str, sorted(NORMAL_LEVELS)))
            raise ValueError(f"`grid: normal` has levels for {levels} bits, and no checkpoint stores their numbers")
        return self

    @property
    @override
    def label(self) -> str:
        word = f"int{self.bits}" if self.grid == "even" else f"nl{self.bits}"
        return f"{word} block {self.block}" + ("" if self.rounding == "nearest" else f" {self.rounding}")

    @property
    @override
    def description(self) -> str:
        activations = {0: "float32 activations", 2: "activations in 16 bits", 4: "int8 activations"}[
            self.accuracy_level
        ]
        rounding = "" if self.rounding == "nearest" else f", {self.rounding}"
        word = f"int{self.bits}" if self.grid == "even" else f"{self.bits} bits of the normal grid"
        return f"{word} in blocks of {self.block}, {activations}{rounding}"

    @property
    @override
    def calibrates(self) -> bool:
        return self.rounding == "gptq"

    @property
    @override
    def keeps_codes(self) -> bool:
        return self.rounding == "stored"

    @property
    @override
    def codes(self) -> int:
        return 2 if self.accuracy_level == 2 else 1

    @override
    def rtn_baseline(self) -> Self:
        return self.model_copy(update={"rounding": "nearest"}) if self.calibrates else self

    @override
    def stored_bytes(self, shape: Shape, scale_bytes: int = 4) -> int:
        elements = math.prod(shape)
        return elements * self.bits // 8 + scale_bytes * (elements // self.block)

    @override
    def calibrated_bytes(self, shape: Shape) -> int:
        return self.stored_bytes(shape, HALF_BYTES) if self.calibrates else 0

    @override
    def check(self, shape: Shape, name: str) -> None:
        check_block(shape[1], self.block, name)
        if self.codes > 1 and len(shape) > 2:
            raise ArrieroError(
                "experts do not round their activations in two steps",
                where=name,
                expected="accuracy_level 4",
                remedy="Give `accuracy_level: 2` to matrices that every token reads",
            )


class _PerChannel(_Scheme):
    """One byte per weight, and one float32 scale per output feature (of each expert)."""

    @override
    def stored_bytes(self, shape: Shape) -> int:
        return math.prod(shape) + 4 * _outputs(shape)


class Fp8(_PerChannel):
    """E4M3 floats (1 sign, 4 exponent, 3 fraction bits, largest 448; OCP 8-bit Floating Point) with a scale per output.

    `activations` fp8 rounds each token to E4M3 as well, at its own largest magnitude / 448; float32 leaves them exact.
    `rounding` is that of `IntBlock`.
    """

    kind: Literal["fp8"]
    activations: Literal["fp8", "float32"]
    rounding: Literal["nearest", "stored"] = "nearest"

    @property
    @override
    def keeps_codes(self) -> bool:
        return self.rounding == "stored"

    @property
    @override
    def label(self) -> str:
        return "fp8 per channel" + ("" if self.rounding == "nearest" else f" {self.rounding}")

    @property
    @override
    def description(self) -> str:
        per_token = " per token" if self.activations == "fp8" else ""
        return f"fp8 (E4M3) per output channel, {self.activations} activations{per_token}"


class Int8Dynamic(_PerChannel):
    """Symmetric int8 weights with a scale per output, int8 activations with a scale per token: absmax / 127."""

    kind: Literal["int8_dynamic"]

    @property
    @override
    def label(self) -> str:
        return "int8 per channel dynamic"

    @property
    @override
    def description(self) -> str:
        return "int8 per output channel, int8 activations per token"


class Static(_PerChannel):
    """One byte per weight with a scale per output, activations in eight bits at one scale per matrix, known beforehand.

    `ranges` observed: the largest magnitude that calibration saw in this matrix's inputs (of each expert: in the rows
    routed to it, times the router's score); weights: that of the weights, a guess. `smooth` is the exponent of
    SmoothQuant (Xiao et al. 2023): how much of the inputs' uneven size per feature is moved into the weights.
    """

    ranges: Literal["observed", "weights"] = "observed"
    smooth: Annotated[StrictFloat, Field(ge=0, le=1)] | None = None
    word: ClassVar[str]  # what both sides are rounded to

    @model_validator(mode="after")
    def _smooths_what_it_saw(self) -> Self:
        if self.smooth is not None and not self.calibrates:
            raise ValueError("`smooth` needs `ranges: observed`: it balances what calibration saw of the inputs")
        return self

    @property
    @override
    def label(self) -> str:
        smooth = "" if self.smooth is None else f" smooth {self.smooth:g}"
        return f"{self.word} per channel static {self.ranges}{smooth}"

    @property
    @override
    def description(self) -> str:
        ranges = "calibrated" if self.calibrates else "taken from the weights"
        smooth = "" if self.smooth is None else f", balanced by SmoothQuant {self.smooth:g}"
        return f"{self.word} per output channel, {self.word} activations at one {ranges} scale{smooth}"

    @property
    @override
    def calibrates(self) -> bool:
        return self.ranges == "observed"

    @override
    def rtn_baseline(self) -> Self:
        return self.model_copy(update={"ranges": "weights", "smooth": None})

    @override
    def stored_bytes(self, shape: Shape) -> int:
        return super().stored_bytes(shape) + 4 * _inputs(shape)

    @override
    def calibrated_bytes(self, shape: Shape) -> int:
        return 4 * (_inputs(shape) + (shape[0] if len(shape) == 3 else 1)) if self.calibrates else 0


class Int8Static(Static):
    """Symmetric int8: what exceeds a static range is clipped to ±127 steps."""

    kind: Literal["int8_static"]
    word: ClassVar[str] = "int8"


class Fp8Static(Static):
    """E4M3 floats as in `Fp8`: what exceeds a static range is clipped to 448, what is far below it loses bits."""

    kind: Literal["fp8_static"]
    word: ClassVar[str] = "fp8"


class AsStored(_Scheme):
    """As the checkpoint stores it: its own integers or E4M3 floats where `IntBlock` or `Fp8` hold them and their scale.

    What is not quantised stays exact. What is, in a form that neither holds (NVFP4, NF4, zero points), is rounded anew,
    `otherwise`. Which tensor becomes what is settled once the checkpoint is known (`Profile.fitted`).
    """

    kind: Literal["as_stored"]
    otherwise: IntBlock

    @property
    @override
    def label(self) -> str:
        return "as stored"

    @property
    @override
    def description(self) -> str:
        return f"the checkpoint's own codes, or else {self.otherwise.description}"

    def held(self, form: tuple[int, int] | None) -> IntBlock | Fp8:
        """The scheme of a quantised tensor by the form of its codes: bits and block, 0 for E4M3; None if not held."""
        if form is None:
            return self.otherwise
        bits, block = form
        if not block:
            return Fp8(kind="fp8", activations="float32", rounding="stored")
        stored = {"bits": bits, "block": block, "rounding": "stored", "grid": "even"}
        return self.otherwise.model_copy(update=stored)


class Chosen(_Scheme):
    """Left to the build: one of the profile's `choose.candidates`, by measured sensitivity."""

    kind: Literal["chosen"]

    @property
    @override
    def label(self) -> str:
        return "chosen"

    @property
    @override
    def description(self) -> str:
        return "chosen per group by measured sensitivity"

    @property
    @override
    def calibrates(self) -> bool:
        return True


Candidate = Annotated[Exact | IntBlock | Fp8 | Int8Dynamic, Field(discriminator="kind")]
Scheme = Annotated[
    Exact | Half | IntBlock | Fp8 | Fp8Static | Int8Dynamic | Int8Static | AsStored | Chosen,
    Field(discriminator="kind"),
]


def _outputs(shape: Shape) -> int:
    """Output features of a matrix [N, K], or of all experts of a stack [E, K, N]."""
    return shape[0] if len(shape) == 2 else shape[0] * shape[2]


def _inputs(shape: Shape) -> int:
    """Input features of a matrix [N, K], or of all experts of a stack [E, K, N]."""
    return shape[1] if len(shape) == 2 else shape[0] * shape[1]
