"""Calibrated roundings on disk: a folder of one profile's integers and scales, of which pieces are read.

Legend: N output features, K input features, J = K / block, E experts.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from arriero.profiles.journal import Journal, Region, Tell, keep_silent
from arriero.profiles.quantize import Quantized
from arriero.profiles.reserved_array import create_array
from arriero.profiles.schemes import IntBlock
from arriero.profiles.static_scales import InputScale

NOTES = "roundings.jsonl"


@dataclass(frozen=True)
class RoundingRecord:
    """How one matrix was rounded. `expert` None: not an expert's. `gain`: output error over that of plain rounding,
    which of a large matrix is judged by some of its rows.

    `rounding` is gptq or observed (a range of inputs), or where too few tokens came, the profile's rule.
    """

    tensor: str
    expert: int | None
    rounding: str
    tokens: int
    largest: float  # absmax of its inputs, 0 if none came
    gain: float | None


class QuantizedWeights:
    """The roundings in `folder`: integers of matrices [N, K] or stacks [E, N, K], or the scales of their inputs.

    Until they are settled, the folder's journal has a piece for each matrix; `tell` as in `Journal`.
    """

    def __init__(self, folder: Path, tell: Tell = keep_silent) -> None:
        self.folder, self.journal = folder, Journal(folder, tell)

    def __contains__(self, name: str) -> bool:
        return any((self.folder / f"{name}.{kind}.npy").is_file() for kind in ("packed", "divisors"))

    def write(
        self, name: str, expert: int | None, experts: int, rounded: Quantized | InputScale, note: RoundingRecord
    ) -> None:
        """Keep one matrix; `expert` is its place in a stack of `experts`. Writing one again replaces it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        kinds = ("packed", "scales") if isinstance(rounded, Quantized) else ("divisors", "largest")
        self.journal.forget(_piece(name, expert))
        regions: list[Region] = []
        for kind, values in ((kind, getattr(rounded, kind)) for kind in kinds):
            file = f"{name}.{kind}.npy"
            if kind == "scales":
                values = values.astype(np.float16)  # which holds each of them
            if expert is None:
                np.save(self.folder / file, values)
                regions.append(Region.whole(self.folder, file))
            else:
                regions += self._write_expert(file, expert, experts, values)
        self.journal.keep(_piece(name, expert), *regions, note=asdict(note))

    def _write_expert(self, file: str, expert: int, experts: int, values: NDArray) -> list[Region]:
        """Write one expert's `values` into the stack's file, and give its region after that of the file's header."""
        path = self.folder / file
        begun = file in self._stacks
        shape = (experts, *values.shape)
        stack = np.lib.format.open_memmap(path, "r+") if begun else create_array(path, values.dtype, shape)
        self._stacks.add(file)
        stack[expert] = values
        stack.flush()
        header = Region.holding(file, 0, np.fromfile(path, np.uint8, stack.offset))
        return [header, Region.holding(file, stack.offset + expert * values.nbytes, values)]

    @cached_property
    def _stacks(self) -> set[str]:
        """The files of stacks that hold something that is kept: any other is begun anew."""
        return {region.file for entry in self.journal.entries.values() for region in entry.regions}

    def check(self) -> set[tuple[str, int | None]]:
        """The matrices (tensor, expert) that an unfinished run left as it wrote them; the others are kept no longer."""
        notes = {piece: entry.note for piece, entry in self.journal.entries.items()}
        return {(note["tensor"], note["expert"]) for piece, note in notes.items() if self.journal.holds(piece)}

    def read(self, name: str, scheme: IntBlock, start: int | None = None, stop: int | None = None) -> Quantized:
        """Rows of the matrix, or experts of the stack, `name` from `start` to `stop`; without them all."""
        packed, scales = (np.load(self.folder / f"{name}.{kind}.npy", mmap_mode="r") for kind in ("packed", "scales"))
        factors = scales[start:stop].astype(np.float32)
        return Quantized(packed[start:stop], factors, scheme.bits, scheme.block, scheme.grid)

    def read_inputs(self, name: str) -> InputScale:
        """The scale of the inputs of the matrix or stack `name`."""
        return InputScale(*(np.load(self.folder / f"{name}.{kind}.npy") for kind in ("divisors", "largest")))

    def adopt(self, other: QuantizedWeights, names: Iterable[str]) -> None:
        """Take over what `other`, on the same file system, holds of the tensors `names`."""
        taken = set(names)
        self.folder.mkdir(parents=True, exist_ok=True)
        for source in (path for name in taken for path in other.folder.glob(f"{glob.escape(name)}.*.npy")):
            (self.folder / source.name).unlink(missing_ok=True)
            (self.folder / source.name).hardlink_to(source)
        for piece, entry in other.journal.entries.items():
            if entry.note["tensor"] in taken:
                self.journal.keep(piece, *entry.regions, note=entry.note)

    def settle(self) -> None:
        """Write the records of all matrices, the same whatever was written twice on the way."""
        if self.journal.entries:
            scratch = (self.folder / NOTES).with_suffix(".partial")
            scratch.write_text("".join(map(_line, self.notes())), encoding="utf-8")
            scratch.replace(self.folder / NOTES)

    def files(self) -> set[str]:
        """The names of the files that hold what was written and adopted; none where nothing was."""
        kinds = ("packed", "scales", "divisors", "largest")
        names = {f"{note.tensor}.{kind}.npy" for note in self.notes() for kind in kinds}
        return {name for name in (NOTES, *names) if (self.folder / name).is_file()}

    def notes(self) -> Sequence[RoundingRecord]:
        """How each matrix was rounded, in order of tensor and expert."""
        records = [entry.note for entry in self.journal.entries.values()]
        path = self.folder / NOTES
        if not records and path.is_file():  # settled, and the journal is gone with the stage's other scraps
            records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return sorted(
            (RoundingRecord(**record) for record in records), key=lambda note: _piece(note.tensor, note.expert)
        )


def _piece(tensor: str, expert: int | None) -> str:
    return tensor if expert is None else f"{tensor}[{expert:05}]"


def _line(record: RoundingRecord) -> str:
    return json.dumps(asdict(record)) + "\n"
