"""A Llama 4 checkpoint on disk: its tensors read lazily through memory maps, after every header has been proven sound.

`Checkpoint.open` refuses a folder whose files contradict each other (headers, shards, index), all findings at once.
`check_ledger` then compares the tensors with what the config says must be there.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arriero.errors import ArrieroError, Problems
from arriero.graphs.names import canonical_name
from arriero.graphs.safetensors_header import NUMPY_DTYPES, REDOWNLOAD, TensorInfo, read_header, to_float32

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MODEL_TYPES = ("llama4", "llama4_text")
FLOAT_DTYPES = ("BF16", "F16", "F32")
SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)
"""Files beside the weights which a bundle takes over, so that a change in one is a change of the checkpoint."""

TORCH_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "BF16": "bfloat16",
    "F16": "float16",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
}


class Checkpoint:
    """A proven checkpoint folder: `config` (config.json as a dict) and `tensors` (canonical name -> TensorInfo)."""

    def __init__(self, folder: Path, config: dict[str, Any], tensors: dict[str, TensorInfo]) -> None:
        self.folder, self.config, self.tensors = folder, config, tensors
        self._maps: dict[Path, np.ndarray] = {}

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Open `folder` (config.json, one safetensors file or an index with shards).

        Raises `ArrieroError` for what makes reading pointless, `Problems` with every contradiction found in the files.
        """
        folder = Path(folder)
        config = read_config(folder)
        shards, listed = _find_shards(folder)
        problems: list[ArrieroError] = []
        infos: list[TensorInfo] = []
        for shard in shards:
            try:
                infos += read_header(shard)
            except Problems as found:
                problems += found.problems
            except ArrieroError as found:
                problems.append(found)
        if listed is not None and not problems:
            problems += _compare_with_index(folder / INDEX, listed, infos)
        text_only = config["model_type"] == "llama4_text"
        tensors: dict[str, TensorInfo] = {}
        for info in infos:
            name = canonical_name(info.stored_name, text_only)
            if name in tensors:
                first = tensors[name]
                what = f"tensor {info.stored_name} is stored twice, first as {first.stored_name} in {first.file.name}"
                problems.append(ArrieroError(what, where=str(info.file), remedy="Remove one of the two files or names"))
            tensors[name] = replace(info, name=name)
        if problems:
            raise Problems(f"the checkpoint {folder} is not sound", problems)
        return cls(folder, config, tensors)

    @property
    def text_only(self) -> bool:
        """Whether this is a `Llama4ForCausalLM`: no vision tower, no projector."""
        return self.config["model_type"] == "llama4_text"

    @property
    def files(self) -> list[Path]:
        """Every file of the checkpoint that the export reads, sorted by name."""
        names = {"config.json", *SIDE_FILES, *([INDEX] if (self.folder / INDEX).exists() else [])}
        present = {self.folder / name for name in names if (self.folder / name).exists()}
        return sorted(present | {info.file for info in self.tensors.values()})

    def info(self, name: str) -> TensorInfo:
        """Describe one tensor, or raise `ArrieroError` with the nearest name."""
        try:
            return self.tensors[name]
        except KeyError:
            import difflib

            near = difflib.get_close_matches(name, self.tensors, n=1)
            remedy = f"The nearest name is {near[0]}" if near else None
            raise ArrieroError(f"there is no tensor {name}", where=str(self.folder), remedy=remedy) from None

    def read(self, name: str) -> np.ndarray:
        """Give a tensor as a read-only memory-mapped array; bf16 as its uint16 bits, f8 as uint8 bits."""
        info = self.info(name)
        return self._bytes(info).view(NUMPY_DTYPES[info.dtype]).reshape(info.shape)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Give rows `start:stop` of axis 0, as `read` would; touches those pages of the file only."""
        info = self.info(name)
        if not info.shape or not 0 <= start <= stop <= info.shape[0]:
            raise ValueError(f"rows {start}:{stop} of {name} with shape {list(info.shape)}")
        return self.read(name)[start:stop]

    def read_float32(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Give a tensor, or rows `start:stop` of it, as a float32 array of its own."""
        info = self.info(name)
        if start == 0 and stop is None:
            return to_float32(self.read(name), info.dtype)
        return to_float32(self.read_rows(name, start, info.shape[0] if stop is None else stop), info.dtype)

    def torch_tensor(self, name: str) -> torch.Tensor:
        """Give a tensor in torch, zero-copy over the read-only map: writing to it would crash the process."""
        import torch

        info = self.info(name)
        dtype = getattr(torch, TORCH_DTYPES[info.dtype])
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=dtype)
        array = self._bytes(info)
        # Torch can view bytes as a wider dtype only where the file aligned them; the writers we know always do.
        if (array.__array_interface__["data"][0] % NUMPY_DTYPES[info.dtype].itemsize) != 0:
            array = array.copy()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(array).view(dtype).reshape(info.shape)

    def content_hash(self, memo: Path | None = None) -> str:
        """Give the sha256 over all `files`, with per-file hashes remembered in `memo` by (path, size, mtime)."""
        known = _read_memo(memo)
        hashes: dict[str, str] = {}
        for file in self.files:
            key = _memo_key(file)
            if key not in known:
                known = {old: value for old, value in known.items() if not old.startswith(f"{file.absolute()}|")}
                with file.open("rb") as stream:
                    known[key] = hashlib.file_digest(stream, "sha256").hexdigest()
                if memo:
                    _write_memo(memo, known)
            hashes[file.name] = known[key]
        return _combine(hashes)

    def known_content_hash(self, memo: Path) -> str | None:
        """Give `content_hash` when `memo` holds every file as it is now, else None; reads no tensor, writes nothing."""
        known = _read_memo(memo)
        keys = {file.name: _memo_key(file) for file in self.files}
        if not all(key in known for key in keys.values()):
            return None
        return _combine({name: known[key] for name, key in keys.items()})

    def _bytes(self, info: TensorInfo) -> np.ndarray:
        if info.nbytes == 0:
            return np.empty(0, np.uint8)
        if info.file not in self._maps:
            with info.file.open("rb") as stream:
                mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            self._maps[info.file] = np.frombuffer(mapped, np.uint8)
        return self._maps[info.file][info.offset : info.offset + info.nbytes]


def read_config(folder: Path) -> dict[str, Any]:
    """Read `folder`/config.json, refusing what is not a Llama 4."""
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "there is no such folder"
        remedy = "Give the folder that holds config.json and the safetensors files"
        raise ArrieroError(what, where=str(folder), expected="a checkpoint folder", remedy=remedy)
    path = folder / "config.json"
    config = _read_json(path, "Download config.json from the model's page into this folder")
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        found = f"model_type is {model_type!r}" if "model_type" in config else "model_type is missing"
        remedy = "Arriero exports Llama 4 checkpoints in Hugging Face layout only"
        raise ArrieroError(found, where=f"{path}:model_type", expected="llama4 or llama4_text", remedy=remedy)
    return config


def check_ledger(
    infos: Iterable[TensorInfo], expected: Mapping[str, tuple[int, ...]], allowed_extra: Sequence[str] = ()
) -> None:
    """Raise `Problems` unless the tensors are exactly `expected` (name -> shape) in a float dtype we read.

    Names that fully match a regular expression of `allowed_extra` may be there besides. Findings that differ only in
    the layer number share one line.
    """
    findings: dict[tuple[str, str, str], list[str]] = {}

    def found(what: str, want: str, remedy: str, name: str) -> None:
        findings.setdefault((what, want, remedy), []).append(name)

    seen: set[str] = set()
    for info in infos:
        if info.name in seen:
            found("is there twice", "each tensor once", "Remove one of the two copies", info.name)
            continue
        seen.add(info.name)
        if info.name not in expected:
            if not any(re.fullmatch(pattern, info.name) for pattern in allowed_extra):
                found("is unknown to the config", "", "Is config.json the one of these weights?", info.name)
            continue
        if info.dtype.startswith("F8_"):
            remedy = "Quantised checkpoints are not accepted as input yet: use the bf16 checkpoint"
            found(f"is stored as {info.dtype}", " or ".join(FLOAT_DTYPES), remedy, info.name)
        elif info.dtype not in FLOAT_DTYPES:
            found(f"is stored as {info.dtype}", " or ".join(FLOAT_DTYPES), "Use the bf16 checkpoint", info.name)
        if info.shape != tuple(expected[info.name]):
            want = f"{list(expected[info.name])}"
            remedy = "config.json and the weights are of different models"
            found(f"has shape {list(info.shape)}", want, remedy, info.name)
    for name in expected:
        if name not in seen:
            found("is missing", "", "Is a shard missing, or config.json of another model?", name)
    problems = [
        ArrieroError(what, where=where, expected=want or None, remedy=remedy)
        for (what, want, remedy), names in findings.items()
        for where in group_names(names)
    ]
    if problems:
        raise Problems("the checkpoint's tensors are not those of its config", problems)


def group_names(names: Iterable[str]) -> list[str]:
    """Fold names that differ in their first number only: `layers.{0-2,7}.x (4 tensors)`; order of first appearance."""
    groups: dict[str, list[int]] = {}
    for name in names:
        number = re.search(r"\d+", name)
        pattern = name if number is None else f"{name[: number.start()]}\0{name[number.end() :]}"
        groups.setdefault(pattern, []).extend([int(number.group())] if number else [])
    return [_show_group(pattern, sorted(numbers)) for pattern, numbers in groups.items()]


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ArrieroError("is missing", where=str(path), remedy=remedy) from None
    except UnicodeDecodeError:
        raise ArrieroError("is not UTF-8 text", where=str(path), expected="JSON", remedy=REDOWNLOAD) from None
    except json.JSONDecodeError as error:
        where = f"{path}:{error.lineno}"
        raise ArrieroError(f"is not JSON ({error.msg})", where=where, expected="JSON", remedy=REDOWNLOAD) from None
    if not isinstance(content, dict):
        raise ArrieroError("is not a JSON object", where=str(path), expected="a JSON object", remedy=remedy)
    return content


def _find_shards(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """Give the safetensors files and the index's map tensor -> file name (None without an index)."""
    single, index = folder / SINGLE, folder / INDEX
    if single.exists() and index.exists():
        what = f"has both {SINGLE} and {INDEX}, so it is not clear which weights are meant"
        raise ArrieroError(what, where=str(folder), expected="one of them", remedy="Remove the one that is stale")
    if single.exists():
        return [single], None
    if not index.exists():
        others = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".pth", ".gguf"))
        seen = f" (it holds {', '.join(others[:4])})" if others else ""
        remedy = "Download the checkpoint in Hugging Face safetensors layout"
        raise ArrieroError(f"no weights found{seen}", where=str(folder), expected=f"{SINGLE} or {INDEX}", remedy=remedy)
    listed = _read_json(index, REDOWNLOAD).get("weight_map")
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
    stored = {(info.stored_name, info.file.name) for info in infos}
    remedy = "The index and the shards are of different downloads: download them together"
    for name, file in listed.items():
        if (name, file) not in stored:
            yield ArrieroError(f"{file} does not hold {name}", where=f"{index}:weight_map", remedy=remedy)
    for info in infos:
        if info.stored_name not in listed:
            what = f"tensor {info.stored_name} is not in the index"
            yield ArrieroError(what, where=str(info.file), expected=f"an entry in {index.name}", remedy=remedy)


def _show_group(pattern: str, numbers: list[int]) -> str:
    if len(numbers) < 2:
        return pattern.replace("\0", str(numbers[0])) if numbers else pattern
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number <= runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"{pattern.replace(chr(0), '{' + shown + '}')} ({len(numbers)} tensors)"


def _combine(hashes: dict[str, str]) -> str:
    return hashlib.sha256("".join(f"{name} {hashes[name]}\n" for name in sorted(hashes)).encode()).hexdigest()


def _memo_key(file: Path) -> str:
    stat = file.stat()
    return f"{file.absolute()}|{stat.st_size}|{stat.st_mtime_ns}"


def _read_memo(memo: Path | None) -> dict[str, str]:
    """Read the memo; a broken one is as good as none, it only costs hashing again."""
    try:
        known = json.loads(memo.read_text()) if memo else {}
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write_memo(memo: Path, known: dict[str, str]) -> None:
    memo.parent.mkdir(parents=True, exist_ok=True)
    partial = memo.with_name(f"{memo.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(known, indent=1))
    partial.replace(memo)
