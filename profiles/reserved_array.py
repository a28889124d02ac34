"""Arrays on disk whose whole space is there before the first value is written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike


def create_array(path: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> Any:
    """A new .npy file, memory-mapped to be written. Raises OSError where the disk has no room for all of it.

    Without that, a write into the map of a file that the disk has no room for ends the process with a signal.
    """
    array = np.lib.format.open_memmap(path, "w+", np.dtype(dtype), shape)
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array
