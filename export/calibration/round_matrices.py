"""Rounds matrices for every profile that calibrates, by what their inputs were seen to be; an expert's are one job.

Legend: K input features, N output features.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from weakref import ReferenceType, ref

import numpy as np
from numpy.typing import NDArray

from arriero.export.proof.routed_rows import ExpertRows
from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.names import expert_tensors
from arriero.profiles.gptq import gptq
from arriero.profiles.grids import Grid
from arriero.profiles.input_factor import EXPERTS_SHRINKAGE, InputFactor
from arriero.profiles.moments import Moments, check_finite
from arriero.profiles.quantize import Quantized, dequantize
from arriero.profiles.quantized_weights import RoundingRecord
from arriero.profiles.recipe import Calibration
from arriero.profiles.schemes import IntBlock, Scheme, Static
from arriero.profiles.static_scales import InputScale, fit_inputs
from arriero.profiles.stored_values import nearest

JUDGED = 1024  # rows of a matrix at most that show what rounding to nearest would cost

Floats = NDArray[np.float32]
Matrix = tuple[str, int | None, Callable[[], Floats], Moments]  # tensor, expert, weight [N, K], its inputs
Done = Collection[tuple[str, str, int | None]]  # form, tensor, expert


@dataclass(frozen=True)
class Form:
    """What one form of a profile makes of tensors: its rule for calibration, and each one's scheme."""

    rule: Calibration | None
    schemes: Mapping[str, Scheme]

    def too_little(self, tokens: int, largest: float) -> bool:
        """Whether what was seen of an expert's inputs is too little for a range of its own."""
        return self.rule is None or tokens < self.rule.minimum_tokens or largest == 0


@dataclass(frozen=True)
class Rounded:
    """A matrix, or the scales of its inputs, as one form has it."""

    form: str
    values: Quantized | InputScale
    note: RoundingRecord


@dataclass(frozen=True)
class Observed:
    """What was seen of a matrix's inputs; it comes after all that was rounded of the matrix."""

    tensor: str
    expert: int | None
    tokens: int
    largest: float


@dataclass(frozen=True)
class ExpertJob:
    """Both matrices of an expert, the rows that it reads, and what each form makes of them, but for what is `done`."""

    layer: int
    expert: int
    checkpoint: Checkpoint
    rows: ExpertRows
    forms: Mapping[str, Form]
    done: Done
    second: bool  # whether a form rounds by second moments

    def is_left(self, tensor: str) -> bool:
        """Whether second moments of the inputs of `tensor` are needed."""
        return self.second and any((form, tensor, self.expert) not in self.done for form in self.forms)


def round_expert(job: ExpertJob) -> Iterator[Rounded | Observed]:
    """What the forms make of an expert's matrices, one after the other.

    Raises ArrieroError for activations that are not finite.
    """
    rounder = Rounder(job.forms, job.done)
    for tensor, expert, weight, seen in expert_matrices(job):
        yield from rounder.round(tensor, expert, weight, seen)
        del weight, seen  # of no use while the next ones are made


def expert_matrices(job: ExpertJob) -> Iterator[Matrix]:
    """Both matrices of an expert, with the moments of what really goes into them."""
    both = ("input", job.rows.pieces), ("input of down_proj", job.rows.inner_pieces)
    for tensor, (name, pieces) in zip(expert_tensors(job.layer), both, strict=True):
        seen = Moments(job.checkpoint.tensors[tensor].shape[1], job.is_left(tensor))
        for rows, samples in pieces():
            check_finite(rows, f"layer {job.layer}, expert {job.expert}, {name}", samples)
            seen.add(rows)
        yield tensor, job.expert, partial(job.checkpoint.read_expert, tensor, job.expert), seen
        del seen  # of no use while the next one is made


class Rounder:
    """Rounds matrices in all `forms`; those that are `done` are left out."""

    def __init__(self, forms: Mapping[str, Form], done: Done) -> None:
        self.forms, self.done = forms, done
        self._factored: tuple[ReferenceType[Moments], tuple[float, float], InputFactor] | None = None

    def round(
        self, tensor: str, expert: int | None, weight: Callable[[], Floats], seen: Moments
    ) -> Iterator[Rounded | Observed]:
        """What each form makes of a matrix, or of one expert's; then what was seen of its inputs."""
        for key, form in self.forms.items():
            scheme = form.schemes[tensor]
            if isinstance(scheme, IntBlock) and scheme.calibrates:
                if (key, tensor, expert) not in self.done:
                    yield Rounded(key, *self._round(form, scheme, tensor, expert, weight(), seen))
            elif isinstance(scheme, Static) and scheme.calibrates:
                largest = float(seen.largest.max())
                # an expert that saw too little gets its range when all of its layer are known
                if expert is None or not form.too_little(seen.count, largest):
                    columns, name = np.abs(weight()).max(0), tensor if expert is None else f"{tensor}[{expert}]"
                    fitted = fit_inputs(seen.largest, columns, scheme.smooth, name)
                    yield Rounded(key, fitted, RoundingRecord(tensor, expert, "observed", seen.count, largest, None))
        yield Observed(tensor, expert, seen.count, float(seen.largest.max(initial=0)))

    def forget(self) -> None:
        """Let go of what was kept for further matrices."""
        self._factored = None

    def _round(
        self, form: Form, scheme: IntBlock, tensor: str, expert: int | None, weight: Floats, seen: Moments
    ) -> tuple[Quantized, RoundingRecord]:
        assert form.rule is not None
        grid, block = Grid(scheme.bits, scheme.grid), scheme.block
        rounded, rounding, gain = None, "nearest", None
        if seen.count >= form.rule.minimum_tokens:
            assert form.rule.damping is not None
            factor = self._factor(seen, form.rule.damping, 0.0 if expert is None else EXPERTS_SHRINKAGE)
            calibrated, error = gptq(weight, factor, grid=grid, block=block, name=tensor)
            some = weight[:: -(-len(weight) // JUDGED)]  # of a large matrix evenly spread rows, for all of them
            plain = dequantize(nearest(some, scheme, name=tensor))
            without = seen.output_error(some - plain) * len(weight) / len(some)
            gain = error / without if without > 0 else None
            if error <= without:  # a matrix whose rounding was better left alone is left alone
                rounded, rounding = calibrated, "gptq"
        if rounded is None:
            rounded = nearest(weight, scheme, name=tensor)
        largest = float(seen.largest.max(initial=0))
        return rounded, RoundingRecord(tensor, expert, rounding, seen.count, largest, gain)

    def _factor(self, seen: Moments, damping: float, shrinkage: float) -> InputFactor:
        """The factor of the moments `seen`; the last one is kept for other matrices and forms that ask for it."""
        shares = damping, shrinkage
        if self._factored is None or self._factored[0]() is not seen or self._factored[1] != shares:
            self._factored = None  # gone before its successor is made
            self._factored = ref(seen), shares, InputFactor.of(seen, *shares)
        return self._factored[2]
