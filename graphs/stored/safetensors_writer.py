"""Writes a safetensors file piece by piece, without ever holding more than one piece in memory."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

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
    folder: Path, files: Mapping[str, Sequence[Group]], progress: Progress | None = None
) -> dict[str, Layout]:
    """Write each of `files` by its path in `folder`, as `write` does; `progress` counts the bytes of all of them."""
    total, done, layouts = sum(group.nbytes for groups in files.values() for group in groups), 0, {}
    for name, groups in files.items():

        def count(written: int, _: int, before: int = done) -> None:
            if progress:
                progress(before + written, total)

        layouts[name] = write(folder / name, groups, count)
        done += sum(group.nbytes for group in groups)
    return layouts


def write(path: Path, groups: Sequence[Group], progress: Progress | None = None) -> Layout:
    """Write all tensors of `groups` to `path` and say where they lie; the file appears whole or not at all.

    `progress(bytes_done, bytes_total)` is called after every piece. A killed call leaves `<path>.partial` and its
    journal; the next call goes on after the last finished group, and one after a finished call does nothing. Both take
    one layout at one path for one content, so `path` must lie in a folder that is keyed by content. Raises ValueError
    when the pieces are not the bytes that were planned.
    """
    layout = plan_layout(groups)
    total = layout.size - len(layout.head)
    if _is_whole(path, layout):
        return layout
    partial, journal = path.with_name(path.name + ".partial"), path.with_name(path.name + ".journal")
    path.parent.mkdir(parents=True, exist_ok=True)
    finished = _finished_groups(partial, journal, layout.head)
    with open(partial, "r+b" if finished is not None else "w+b") as file, open(journal, "ab") as log:
        if finished is None:
            log.truncate(0)
            file.write(layout.head)
        done = sum(group.nbytes for group in groups[: finished or 0])
        for group in groups[finished or 0 :]:
            cursors = [layout.offsets[spec.name] for spec in group.specs]
            for arrays in group.pieces():
                for number, array in enumerate(arrays):
                    file.seek(cursors[number])
                    cursors[number] += file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
                    done += array.nbytes
                if progress:
                    progress(done, total)
            for spec, cursor in zip(group.specs, cursors, strict=True):
                if cursor != layout.offsets[spec.name] + spec.nbytes:
                    came = cursor - layout.offsets[spec.name]
                    raise ValueError(f"{spec.name}: {came} bytes came where {spec.nbytes} were planned")
            _flush(file.fileno(), file.flush)
            log.write(b"\n")
            _flush(log.fileno(), log.flush)
    os.replace(partial, path)
    journal.unlink()
    return layout


def _is_whole(path: Path, layout: Layout) -> bool:
    if not path.is_file() or path.stat().st_size != layout.size:
        return False
    with open(path, "rb") as file:
        return file.read(len(layout.head)) == layout.head


def _flush(descriptor: int, flush: Callable[[], None]) -> None:
    flush()
    os.fsync(descriptor)


def _finished_groups(partial: Path, journal: Path, head: bytes) -> int | None:
    """How many groups an interrupted `write` of the same layout has finished; None when there is nothing to go on."""
    if not (partial.is_file() and journal.is_file()):
        return None
    with open(partial, "rb") as file:
        return journal.stat().st_size if file.read(len(head)) == head else None


def row_slices(rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """[start, stop) ranges covering `rows`, each of about PIECE_BYTES."""
    step = max(1, PIECE_BYTES // max(1, row_bytes))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
