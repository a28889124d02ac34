"""Arrays of zeros that take memory only where they are written, and give it back where nothing is held any more."""

from __future__ import annotations

import mmap
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux's number on x86-64 and ARM; Python has the name since 3.13


def lazy_zeros(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """An array of zeros; it starts on a page of its own, and no page is taken before it is written.

    Raises OSError where the system has no room for it, taken or not.
    """
    count = int(np.prod(shape, dtype=np.int64))
    nbytes = max(count * np.dtype(dtype).itemsize, 1)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    with suppress(OSError):  # a kernel without huge pages does not know the word
        memory.madvise(mmap.MADV_NOHUGEPAGE)  # where they are taken unasked, one number would take two megabytes
    return np.frombuffer(memory, dtype, count).reshape(shape)


def give_back(array: NDArray[Any]) -> None:
    """Free the pages that lie whole in `array`, a contiguous part of a `lazy_zeros`; they hold zeros again."""
    base = array
    while not isinstance(base, mmap.mmap):
        base = base.obj if isinstance(base, memoryview) else base.base  # type: ignore[assignment]
        if base is None:
            raise ValueError("the array is no part of a `lazy_zeros`")
    start = array.ctypes.data - np.frombuffer(base, np.uint8).ctypes.data
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (start + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if first < stop:
        base.madvise(mmap.MADV_DONTNEED, first, stop - first)
