"""Writes a safetensors file piece by piece, without ever holding more than one piece in memory."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from arriero.profiles.journal import Journal, Region, Tell, keep_silent

ALIGNMENT = 4096  # the data section starts on a page, so that a memory map of it is aligned
CACHE_LINE = 64
PIECE_BYTES = 32 * 2**20  # what producers aim at
ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "I32": 4, "I8": 1, "U8": 1, "F8_E4M3": 1, "I4": 0.5}
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Spec:
    """One tensor to come."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return int(math.prod(self.shape) * ITEM_BYTES[self.dtype])

    @property
    def entry(self) -> dict[str, object]:
        """Its entry in the header, offsets aside. The format has no four-bit integers: those are bytes there."""
        packed = self.dtype == "I4"
        return {"dtype": "U8" if packed else self.dtype, "shape": [self.nbytes] if packed else list(self.shape)}


@dataclass(frozen=True)
class Group:
    """Tensors made together: `pieces()` yields, in order, the next array of each of `specs` (say packed and scales)."""

    specs: tuple[Spec, ...]
    pieces: Callable[[], Iterable[tuple[np.ndarray, ...]]]

    @property
    def nbytes(self) -> int:
        """The bytes of its tensors."""
        return sum(spec.nbytes for spec in self.specs)


@dataclass(frozen=True)
class Layout:
    """The file's `head` bytes, the absolute offset of every tensor by name, and the file's size."""

    head: bytes
    offsets: dict[str, int]
    size: int


def plan_layout(groups: Sequence[Group]) -> Layout:
    """Place every tensor, each aligned to its items at least. Names must be unique.

    Those whose size is a multiple of a cache line come first, so that they all begin on one; then wide dtypes.
    """
    header: dict[str, object] = {}
    offsets: dict[str, int] = {}
    cursor = 0
    specs = [spec for group in groups for spec in group.specs]
    for spec in sorted(specs, key=lambda spec: (spec.nbytes % CACHE_LINE > 0, -ITEM_BYTES[spec.dtype])):
        if spec.name in header:
            raise ValueError(f"two tensors are called {spec.name}")
        span = [cursor, cursor + spec.nbytes]
        header[spec.name] = {**spec.entry, "data_offsets": span}
        offsets[spec.name], cursor = span
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    start = len(text) + 8
    head = len(text).to_bytes(8, "little") + text
    return Layout(head, {name: start + offset for name, offset in offsets.items()}, start + cursor)


def split(groups: Iterable[Group], most: int) -> list[list[Group]]:
    """The groups file by file, in their order, so that none has more than `most` bytes.

    A group that is larger by itself has a file of its own.
    """
    files: list[list[Group]] = []
    size = most
    for group in groups:
        # what the header says of a tensor, its offsets as long as they can be
        own = group.nbytes + sum(len(json.dumps({spec.name: spec.entry})) + 64 for spec in group.specs)
        if size + own > most:
            files.append([])
            size = ALIGNMENT
        files[-1].append(group)
        size += own
    return files


def write_all(
    folder: Path, files: Mapping[str, Sequence[Group]], progress: Progress | None = None, tell: Tell = keep_silent
) -> dict[str, Layout]:
    """Write each of `files` by its path in `folder`; each appears whole or not at all. Give their layouts.

    `progress(bytes_done, bytes_total)` is called after every piece and counts the bytes of all files. What a killed
    call leaves is in the folder's journal with the hash of every group; the next call makes those again that are
    missing, or were changed. Both take one layout at one path for one content, so `folder` must be keyed by content.
    Raises ValueError when the pieces are not the bytes that were planned.
    """
    journal = Journal(folder, tell)
    total, done, layouts = sum(group.nbytes for groups in files.values() for group in groups), 0, {}
    for name, groups in files.items():

        def count(written: int, before: int = done) -> None:
            if progress:
                progress(before + written, total)

        layouts[name] = _write(folder, name, groups, count, journal)
        done += sum(group.nbytes for group in groups)
    return layouts


def _write(
    folder: Path, name: str, groups: Sequence[Group], progress: Callable[[int], None], journal: Journal
) -> Layout:
    layout = plan_layout(groups)
    path, unfinished = folder / name, f"{name}.partial"
    partial = folder / unfinished
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        os.replace(path, partial)
    pieces = [f"group {number} of {name}" for number in range(len(groups))]
    resumed = _begins_with(partial, layout.head)
    with open(partial, "r+b" if resumed else "w+b") as file:
        if not resumed:
            for piece in pieces:
                journal.forget(piece)
            file.write(layout.head)
        done = 0
        for piece, group in zip(pieces, groups, strict=True):
            if not journal.holds(piece):
                regions = _write_group(file, unfinished, layout, group, progress, done)
                file.flush()
                os.fsync(file.fileno())
                journal.keep(piece, *regions)
            done += group.nbytes
    os.replace(partial, path)
    return layout


def _write_group(
    file: BinaryIO, name: str, layout: Layout, group: Group, progress: Callable[[int], None], before: int
) -> list[Region]:
    """Write the pieces of a group into the file called `name`, and give the region of each of its tensors.

    `before`: the bytes of the groups before it.
    """
    written, digests = [0] * len(group.specs), [hashlib.sha256() for _ in group.specs]
    for arrays in group.pieces():
        for number, (spec, array) in enumerate(zip(group.specs, arrays, strict=True)):
            content = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            file.seek(layout.offsets[spec.name] + written[number])
            written[number] += file.write(content)
            digests[number].update(content)
        progress(before + sum(written))
    for spec, count in zip(group.specs, written, strict=True):
        if count != spec.nbytes:
            raise ValueError(f"{spec.name}: {count} bytes came where {spec.nbytes} were planned")
    return [
        Region(name, layout.offsets[spec.name], spec.nbytes, digest.hexdigest())
        for spec, digest in zip(group.specs, digests, strict=True)
    ]


def _begins_with(partial: Path, head: bytes) -> bool:
    if not partial.is_file():
        return False
    with open(partial, "rb") as file:
        return file.read(len(head)) == head


def row_slices(rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """[start, stop) ranges covering `rows`, each of about PIECE_BYTES."""
    step = max(1, PIECE_BYTES // max(1, row_bytes))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
