"""A folder of safetensors files, one or an index and its shards: every tensor under the name that it has there."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arriero.errors import ArrieroError, Problems
from arriero.graphs.sources.safetensors_header import NUMPY_DTYPES, REDOWNLOAD, TensorInfo, read_header, to_float32
from arriero.graphs.sources.weight_source import FilePlace
from arriero.strict_json import read_json_object

SINGLE = "model.safetensors"
INDEX_ENDING = ".index.json"


class MappedFile:
    """A file's bytes, mapped into memory when they are first asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes: NDArray[np.uint8] | None = None

    def bytes(self, offset: int, count: int) -> NDArray[np.uint8]:
        """`count` bytes from `offset` on, read-only."""
        if count == 0:
            return np.empty(0, np.uint8)
        if self._bytes is None:
            with self.path.open("rb") as stream:
                mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            self._bytes = np.frombuffer(mapped, np.uint8)
        return self._bytes[offset : offset + count]


@dataclass(frozen=True)
class SafetensorsWeight:
    """A tensor that a safetensors file holds as it is (see `WeightSource`)."""

    name: str
    info: TensorInfo
    mapped: MappedFile

    @property
    def shape(self) -> tuple[int, ...]:
        """As the header says."""
        return self.info.shape

    @property
    def dtype(self) -> str:
        """As the header says."""
        return self.info.dtype

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.info.nbytes

    @property
    def form(self) -> str:
        """The dtype."""
        return self.dtype.lower()

    @property
    def codes(self) -> None:
        """A tensor that stands as it is has no codes."""
        return None

    @property
    def stored(self) -> str:
        """Name and file."""
        return f"{self.info.name} in {self.info.file.name}"

    @property
    def place(self) -> FilePlace:
        """Its span of the file."""
        return FilePlace(self.info.file, self.info.offset)

    def rows(self, start: int, stop: int) -> NDArray[Any]:
        """Rows of the memory map; touches those pages of the file only. Raises ValueError for rows beyond it."""
        count = self.shape[0] if self.shape else 1
        if not 0 <= start <= stop <= count:
            raise ValueError(f"rows {start}:{stop} of {self.name} with shape {list(self.shape)}")
        row_bytes = self.nbytes // count if count else 0
        raw = self.mapped.bytes(self.info.offset + start * row_bytes, (stop - start) * row_bytes)
        shape = (stop - start, *self.shape[1:]) if self.shape else ()
        return raw.view(NUMPY_DTYPES[self.dtype]).reshape(shape)

    def float32(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows in float32."""
        return to_float32(self.rows(start, stop), self.dtype)


def open_safetensors(folder: Path, single: str = SINGLE) -> tuple[dict[str, SafetensorsWeight], list[Path]]:
    """The tensors of a folder by the names in its files, and the files, every header proven sound.

    `single` is the name of the file that needs no index.

    Raises `ArrieroError` for what makes reading pointless, `Problems` with every contradiction between the files.
    """
    index = folder / f"{single}{INDEX_ENDING}"
    shards, listed = _find_shards(folder / single, index)
    problems: list[ArrieroError] = []
    infos: list[TensorInfo] = []
    for shard in shards:
        try:
            infos += read_header(shard)
        except Problems as unsound:
            problems += unsound.problems
        except ArrieroError as unsound:
            problems.append(unsound)
    if listed is not None and not problems:
        problems += _compare_with_index(index, listed, infos)
    maps = {shard: MappedFile(shard) for shard in shards}
    tensors: dict[str, SafetensorsWeight] = {}
    for info in infos:
        if info.name in tensors:
            what = f"tensor {info.name} is stored twice, first as {tensors[info.name].stored}"
            problems.append(ArrieroError(what, where=str(info.file), remedy="Remove one of the two files or names"))
        tensors[info.name] = SafetensorsWeight(info.name, info, maps[info.file])
    if problems:
        raise Problems(f"the checkpoint {folder} is not sound", problems)
    return tensors, [*([index] if listed is not None else []), *shards]


def _find_shards(single: Path, index: Path) -> tuple[list[Path], dict[str, str] | None]:
    """Give the safetensors files and the index's map tensor -> file name (None without an index)."""
    folder = single.parent
    if single.exists() and index.exists():
        what = f"has both {single.name} and {index.name}, so it is not clear which weights are meant"
        raise ArrieroError(what, where=str(folder), expected="one of them", remedy="Remove the one that is stale")
    if single.exists():
        return [single], None
    if not index.exists():
        others = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".pth", ".gguf"))
        seen = f" (it holds {', '.join(others[:4])})" if others else ""
        remedy = "Download the checkpoint in Hugging Face safetensors layout"
        raise ArrieroError(
            f"no weights found{seen}", where=str(folder), expected=f"{single.name} or {index.name}", remedy=remedy
        )
    listed = read_json_object(index, REDOWNLOAD).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        what = "weight_map is missing or empty"
        raise ArrieroError(what, where=str(index), expected="tensor name -> file name", remedy=REDOWNLOAD)
    problems: list[ArrieroError] = []
    for name in sorted({str(file) for file in listed.values()}):
        where = f"{index}:weight_map"
        if Path(name).name != name:
            what = f"{name} is not a plain file name"
            problems.append(ArrieroError(what, where=where, expected="a file beside the index", remedy=REDOWNLOAD))
        elif not (folder / name).is_file():
            tensors = sum(file == name for file in listed.values())
            what = f"the shard {name} is missing ({tensors} tensors)"
            problems.append(ArrieroError(what, where=where, remedy=f"Download {name} into {folder}"))
    if problems:
        raise Problems(f"the checkpoint {folder} is not complete", problems)
    return [folder / name for name in sorted(set(listed.values()))], listed


def _compare_with_index(index: Path, listed: dict[str, str], infos: list[TensorInfo]) -> Iterator[ArrieroError]:
    stored = {(info.name, info.file.name) for info in infos}
    remedy = "The index and the shards are of different downloads: download them together"
    for name, file in listed.items():
        if (name, file) not in stored:
            yield ArrieroError(f"{file} does not hold {name}", where=f"{index}:weight_map", remedy=remedy)
    for info in infos:
        if info.name not in listed:
            what = f"tensor {info.name} is not in the index"
            yield ArrieroError(what, where=str(info.file), expected=f"an entry in {index.name}", remedy=remedy)
