"""The header of a safetensors file, proven against the file before anything is read, and its dtypes.

The file: 8 bytes little-endian header length, a JSON object name -> {dtype, shape, data_offsets}, then the tensors
end to end. What the header promises and the file does not hold is refused, all findings at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arriero.errors import ArrieroError, Problems
from arriero.strict_json import parse_json

# How numpy sees each safetensors dtype. bf16 and f8, which numpy lacks, are seen as raw bits.
NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(code)
    for name, code in {
        "BOOL": "?",
        "U8": "u1",
        "I8": "i1",
        "F8_E4M3": "u1",
        "F8_E5M2": "u1",
        "BF16": "<u2",
        "F16": "<f2",
        "U16": "<u2",
        "I16": "<i2",
        "U32": "<u4",
        "I32": "<i4",
        "F32": "<f4",
        "U64": "<u8",
        "I64": "<i8",
        "F64": "<f8",
    }.items()
}
MAX_HEADER = 100_000_000
REDOWNLOAD = "Download or copy this file again"


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `name` is that of the file, `offset` counts from the start of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


def read_header(file: Path) -> list[TensorInfo]:
    """Parse the safetensors header of `file` and prove it against the file's size; raises all findings at once."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if start.startswith(b"version "):
            remedy = "Fetch the content with `git lfs pull`"
            raise ArrieroError("is a Git LFS pointer, not the weights", where=str(file), remedy=remedy)
        if len(start) < 8:
            what = f"is {size} bytes long, too short for a safetensors header"
            raise ArrieroError(what, where=str(file), remedy=REDOWNLOAD)
        length = int.from_bytes(start, "little")
        if length > MAX_HEADER or length < 2:
            what = f"the header claims {length:,} bytes, so this is no safetensors file"
            raise ArrieroError(what, where=str(file), expected=f"2 to {MAX_HEADER:,} bytes", remedy=REDOWNLOAD)
        if 8 + length > size:
            what = f"is truncated inside its header: {size:,} bytes"
            raise ArrieroError(what, where=str(file), expected=f"more than {8 + length:,}", remedy=REDOWNLOAD)
        raw = stream.read(length)
    doubled: list[str] = []
    header = parse_json(raw, str(file), REDOWNLOAD, lambda pairs: _no_doubles(pairs, doubled))
    if not isinstance(header, dict):
        raise ArrieroError("the header is not a JSON object", where=str(file), remedy=REDOWNLOAD)
    header.pop("__metadata__", None)
    problems = [ArrieroError("is in the header twice", where=f"{file}:{name}", remedy=REDOWNLOAD) for name in doubled]
    infos = []
    for name, entry in header.items():
        try:
            infos.append(_read_entry(file, name, entry, 8 + length))
        except ArrieroError as error:
            problems.append(error)
    problems += _check_layout(file, infos, 8 + length, size) if not problems else []
    if problems:
        raise Problems(f"{file} is not sound", problems)
    return infos


def to_float32(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Convert an array as `Checkpoint.read` gives it to a float32 array of its own; raises for integer dtypes."""
    if dtype == "BF16":
        # bf16 is the upper half of an f32: moved there in place, so that no third copy of a big tensor ever exists.
        wide = raw.astype(np.uint32)
        wide <<= np.uint32(16)
        return wide.view(np.float32)
    if dtype in ("F16", "F32", "F64"):
        return raw.astype(np.float32)
    if dtype in ("F8_E4M3", "F8_E5M2"):
        return _f8_values(dtype)[raw]
    raise ValueError(f"{dtype} is no float dtype")


def _read_entry(file: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    where = f"{file}:{name}"
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        sane = all(type(n) is int and n >= 0 for n in (*shape, begin, end)) and begin <= end and isinstance(dtype, str)
    except (TypeError, KeyError, ValueError):
        sane = False
    if not sane:
        expected = "dtype, shape and two ascending data_offsets"
        raise ArrieroError("its header entry is malformed", where=where, expected=expected, remedy=REDOWNLOAD)
    if dtype not in NUMPY_DTYPES:
        known = ", ".join(NUMPY_DTYPES)
        raise ArrieroError(f"unknown dtype {dtype!r}", where=where, expected=f"one of {known}", remedy=REDOWNLOAD)
    nbytes = math.prod(shape) * NUMPY_DTYPES[dtype].itemsize
    if nbytes != end - begin:
        what = f"shape {shape} of {dtype} is {nbytes:,} bytes, but its offsets span {end - begin:,}"
        raise ArrieroError(what, where=where, expected="equal sizes", remedy=REDOWNLOAD)
    return TensorInfo(name, dtype, tuple(shape), file, data_start + begin, nbytes)


def _check_layout(file: Path, infos: list[TensorInfo], data_start: int, size: int) -> Iterator[ArrieroError]:
    """Find overlaps, holes, and a file that is shorter or longer than its tensors."""
    end, before = data_start, "the header"
    for info in sorted(infos, key=lambda info: (info.offset, info.nbytes)):
        if info.offset < end:
            what = f"overlaps {before} by {end - info.offset:,} bytes"
            yield ArrieroError(what, where=f"{file}:{info.name}", remedy=REDOWNLOAD)
        elif info.offset > end:
            what = f"{info.offset - end:,} unclaimed bytes lie between {before} and this tensor"
            yield ArrieroError(what, where=f"{file}:{info.name}", remedy=REDOWNLOAD)
        if info.offset + info.nbytes >= end:
            end, before = info.offset + info.nbytes, info.name
    if end > size:
        cut = [info.name for info in infos if info.offset + info.nbytes > size]
        what = f"is truncated: {size:,} bytes, {len(cut)} tensors cut off, the first {cut[0]}"
        yield ArrieroError(what, where=str(file), expected=f"{end:,} bytes", remedy=REDOWNLOAD)
    elif end < size:
        what = f"{size - end:,} bytes follow the last tensor"
        yield ArrieroError(what, where=str(file), expected=f"{end:,} bytes", remedy=REDOWNLOAD)


def _no_doubles(pairs: list[tuple[str, Any]], doubled: list[str]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        doubled += sorted({name for name in names if names.count(name) > 1})
    return result


def _f8_values(dtype: str) -> np.ndarray:
    """All 256 values of an f8 dtype as float32 [256]."""
    fraction_bits, bias = (3, 7) if dtype == "F8_E4M3" else (2, 15)
    bits = np.arange(256)
    sign = np.where(bits & 0x80, -1.0, 1.0)
    exponent = (bits & 0x7F) >> fraction_bits
    fraction = (bits & ((1 << fraction_bits) - 1)) / (1 << fraction_bits)
    values = np.where(exponent == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * 2.0 ** (exponent - float(bias)))
    if dtype == "F8_E4M3":
        values = np.where((bits & 0x7F) == 0x7F, np.nan, values)
    else:
        values = np.where(exponent == 31, np.where(fraction == 0, np.inf, np.nan), values)
    return (sign * values).astype(np.float32)
