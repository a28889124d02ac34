"""Calibrated roundings on disk: a folder of one profile's integers and scales, of which pieces are read.

Legend: N output features, K input features, J = K / block, E experts.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

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
    """The roundings in `folder`: integers of matrices [N, K] or stacks [E, N, K], or the scales of their inputs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __contains__(self, name: str) -> bool:
        return any((self.folder / f"{name}.{kind}.npy").is_file() for kind in ("packed", "divisors"))

    def write(
        self, name: str, expert: int | None, experts: int, rounded: Quantized | InputScale, note: RoundingRecord
    ) -> None:
        """Keep one matrix; `expert` is its place in a stack of `experts`. Writing one again replaces it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        kinds = ("packed", "scales") if isinstance(rounded, Quantized) else ("divisors", "largest")
        for kind, values in ((kind, getattr(rounded, kind)) for kind in kinds):
            path = self.folder / f"{name}.{kind}.npy"
            if kind == "scales":
                values = values.astype(np.float16)  # which holds each of them
            if expert is None:
                np.save(path, values)
                continue
            shape = (experts, *values.shape)
            there = path.is_file()
            stack = np.lib.format.open_memmap(path, "r+") if there else create_array(path, values.dtype, shape)
            stack[expert] = values
            stack.flush()
        self._note([note])

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
        self._note([note for note in other.notes() if note.tensor in taken])

    def settle(self) -> None:
        """Leave one record of each matrix, so that the file is the same whatever was written twice on the way."""
        path = self.folder / NOTES
        if path.is_file():
            scratch = path.with_suffix(".partial")
            scratch.write_text("".join(map(_line, self.notes())), encoding="utf-8")
            scratch.replace(path)

    def files(self) -> set[str]:
        """The names of the files that hold what was written and adopted; none where nothing was."""
        kinds = ("packed", "scales", "divisors", "largest")
        names = {f"{note.tensor}.{kind}.npy" for note in self.notes() for kind in kinds}
        return {name for name in (NOTES, *names) if (self.folder / name).is_file()}

    def notes(self) -> Sequence[RoundingRecord]:
        """How each matrix was rounded, the last word on each."""
        path = self.folder / NOTES
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        records = [RoundingRecord(**record) for line in lines if (record := _record(line)) is not None]
        return list({(note.tensor, note.expert): note for note in records}.values())

    def _note(self, records: Sequence[RoundingRecord]) -> None:
        with (self.folder / NOTES).open("a+b") as notes:
            notes.seek(max(0, notes.seek(0, os.SEEK_END) - 1))
            torn = notes.read(1) not in (b"", b"\n")
            notes.write(b"\n" * torn + "".join(map(_line, records)).encode())


def _line(record: RoundingRecord) -> str:
    return json.dumps(asdict(record)) + "\n"


def _record(line: str) -> dict[str, Any] | None:
    """What a line says; None for one that a full disk cut short, whose matrix is written again."""
    try:
        record: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return record
