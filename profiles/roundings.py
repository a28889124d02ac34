"""Calibrated roundings on disk: a folder of one profile's packed integers and scales, opened without reading them.

Legend: N output features, K input features, J = K / block, E experts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arriero.profiles.quantize import Quantized

NOTES = "roundings.jsonl"


@dataclass(frozen=True)
class Note:
    """How one matrix was rounded. `expert` None: not an expert's. `gain`: output error over that of plain rounding."""

    tensor: str
    expert: int | None
    rounding: str  # gptq, or nearest where too few tokens came
    tokens: int
    largest: float  # absmax of its inputs, 0 if none came
    gain: float | None


class Roundings:
    """The roundings in `folder`: matrices [N, K], or stacks of experts [E, N, K]."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __contains__(self, name: str) -> bool:
        return (self.folder / f"{name}.packed.npy").is_file()

    def write(self, name: str, expert: int | None, experts: int, rounded: Quantized, note: Note) -> None:
        """Keep one matrix; `expert` is its place in a stack of `experts`. Writing one again replaces it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for kind, values in (("packed", rounded.packed), ("scales", rounded.scales)):
            path = self.folder / f"{name}.{kind}.npy"
            if expert is None:
                np.save(path, values)
                continue
            mode = "r+" if path.is_file() else "w+"
            shape: Any = (experts, *values.shape)
            stack = np.lib.format.open_memmap(path, mode, values.dtype, shape)
            stack[expert] = values
            stack.flush()
        with (self.folder / NOTES).open("a", encoding="utf-8") as notes:
            notes.write(json.dumps(asdict(note)) + "\n")

    def read(self, name: str, bits: int, block: int) -> Quantized:
        """The matrix or stack `name`, memory-mapped."""
        packed, scales = (np.load(self.folder / f"{name}.{kind}.npy", mmap_mode="r") for kind in ("packed", "scales"))
        return Quantized(packed, scales, bits, block)

    def notes(self) -> Sequence[Note]:
        """How each matrix was rounded, the last word on each."""
        path = self.folder / NOTES
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        found = [Note(**json.loads(line)) for line in lines]
        return list({(note.tensor, note.expert): note for note in found}.values())
