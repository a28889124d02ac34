"""One tensor of a checkpoint, wherever and however it is stored: what the rest of the code sees of a layout.

A layout's module knows files, names and formats; it gives each tensor under its canonical name, with its canonical
shape, as rows that are read when they are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from arriero.graphs.sources.stored_codes import StoredCodes


@dataclass(frozen=True)
class FilePlace:
    """Where a tensor's bytes lie in one file, end to end, as `WeightSource.rows` gives them."""

    file: Path
    offset: int  # from the start of the file


class WeightSource(Protocol):
    """A tensor that is read row by row; a row is what one index of axis 0 selects."""

    @property
    def name(self) -> str:
        """The canonical name."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """The canonical shape."""
        ...

    @property
    def dtype(self) -> str:
        """What `rows` gives, as safetensors names it: BF16, F16, F32, .."""
        ...

    @property
    def nbytes(self) -> int:
        """The size of the whole tensor in that dtype."""
        ...

    @property
    def stored(self) -> str:
        """The tensor's name in its file, and the file's name, for errors."""
        ...

    @property
    def form(self) -> str:
        """What the values are stored as, in a few words: bf16, int4 block 128, nvfp4."""
        ...

    @property
    def codes(self) -> StoredCodes | None:
        """The codes and scales that the checkpoint holds, where one of our schemes takes them as they are."""
        ...

    @property
    def place(self) -> FilePlace | None:
        """Where exactly these bytes lie in a file; None where they are made when they are read."""
        ...

    def rows(self, start: int, stop: int) -> NDArray[Any]:
        """Rows `start` to `stop`, read-only; bf16 as its uint16 bits, f8 as uint8 bits. A scalar has no rows to slice:
        it is row 0 to 1.
        """
        ...

    def float32(self, start: int, stop: int) -> NDArray[np.float32]:
        """The same rows in float32, in an array of its own."""
        ...
