"""GGUF, llama.cpp's layout: one file or several parts, and a vision tower's in a file of its own.

The `gguf` package reads files and number formats; rows of q and k stand there as in Hugging Face's files. Legend: E
experts, N outputs, K inputs.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arriero.errors import ArrieroError, MachineLacks, raise_together, sentence_of
from arriero.graphs.sources.fuse_experts import fuse_experts
from arriero.graphs.sources.gguf_config import ARCHITECTURE, multimodal_config, text_config
from arriero.graphs.sources.gguf_names import ROPE_FACTORS, canonical_name
from arriero.graphs.sources.layout import TEMPLATES, Layout, files_beside
from arriero.graphs.sources.llama4_defaults import default_side_files
from arriero.graphs.sources.made_weight import MadeWeight
from arriero.graphs.sources.quantized.codecs import Floats
from arriero.graphs.sources.safetensors_header import NUMPY_DTYPES
from arriero.graphs.sources.stored_codes import StoredCodes
from arriero.graphs.sources.tokenizer_json import tokenizer_json
from arriero.graphs.sources.weight_source import WeightSource
from arriero.profiles.quantize import Quantized
from arriero.traits import install

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor

PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
PLAIN = ("F32", "F16", "BF16")
TOKENIZER = "tokenizer.json"
TEMPLATE = "tokenizer.chat_template"  # the default; a name may follow it, after a point
SPLITS = ("llama4", "gpt-4o")  # names of one way to cut a text into words
AGAIN = "Download or copy the file again"
BLOCK = 32  # values that share a scale in Q8_0 and Q4_0


@dataclass(frozen=True)
class GgufFile:
    """One file, read as far as its keys and where its tensors lie."""

    path: Path
    reader: GGUFReader
    keys: dict[str, Any]  # the key-value pairs, as Python values

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """Read the header. Raises ArrieroError for what is no GGUF, MachineLacks without the package."""
        try:
            from gguf import GGUFReader
        except ModuleNotFoundError as error:
            if error.name != "gguf":
                raise
            remedy = f"Install it with `{install('gguf')}`"
            raise MachineLacks("reading GGUF needs the package gguf", where=str(path), remedy=remedy) from None
        try:
            reader = GGUFReader(path)
            return cls(path, reader, {name: field.contents() for name, field in reader.fields.items()})
        except Exception as error:  # the library asserts, indexes and decodes its way through a broken file
            what = f"is no sound GGUF file ({error or type(error).__name__})"
            raise ArrieroError(what, where=str(path), remedy=AGAIN) from None

    def tensors(self) -> Iterator[tuple[str, ReaderTensor]]:
        """Each tensor by the file's name for it. Raises ArrieroError where the file ends before it does."""
        size = self.path.stat().st_size
        for tensor in self.reader.tensors:
            if tensor.data_offset + tensor.n_bytes > size:
                what = f"is truncated: {size:,} bytes, and {tensor.name} ends beyond them"
                raise ArrieroError(what, where=str(self.path), remedy=AGAIN)
            yield tensor.name, tensor


def open_folder(path: Path) -> Layout:
    """The checkpoint in a folder of GGUF files, or in the file `path` and those beside it that belong to it."""
    parts, tower = _find(path)
    opened = [GgufFile.open(part) for part in parts]
    keys = {name: value for file in opened for name, value in file.keys.items()}
    architecture = keys.get("general.architecture")
    where = str(parts[0])
    if architecture != ARCHITECTURE:
        remedy = "Arriero exports Llama 4 checkpoints only; no other architecture is approximated"
        what = f"is a model of architecture {architecture!r}"
        raise ArrieroError(what, where=f"{where}:general.architecture", expected=ARCHITECTURE, remedy=remedy)
    tensors, factors = _tensors(opened)
    seen = None if tower is None else GgufFile.open(tower)
    pixels = {} if seen is None else _tensors([seen])[0]
    try:
        config = text_config(keys, tensors, factors, where)
        if seen is not None:
            config = multimodal_config(config, keys, seen.keys, pixels, str(seen.path))
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, StopIteration) as error:
        what = f"holds a key of another kind than Llama 4's ({sentence_of(error)})"
        raise ArrieroError(what, where=where, remedy=AGAIN) from None
    own = files_beside(parts[0].parent)
    files = [*parts, *([tower] if tower is not None else []), *(parts[0].parent / name for name in own)]
    made = _side_files(keys, config)
    if not any("chat_template" in name for name in own):
        made |= _named_templates(keys)
    if TOKENIZER not in own:
        made[TOKENIZER] = _tokenizer(keys, where)
    return Layout("GGUF", config, fuse_experts(tensors | pixels), files, None, made | own)


def _find(path: Path) -> tuple[list[Path], Path | None]:
    """The parts of the model in order, and its vision tower's file."""
    folder = path if path.is_dir() else path.parent
    there = sorted(folder.glob("*.gguf"))
    towers = [file for file in there if "mmproj" in file.name.lower()]
    models = {file: file.name for file in there if file not in towers}
    if path.is_dir():
        stems = {(match["stem"] if (match := PART.fullmatch(name)) else name) for name in models.values()}
        if len(stems) != 1:
            raise ArrieroError(
                f"holds {len(stems)} models: {', '.join(sorted(stems))}",
                where=str(folder),
                expected="one",
                remedy="Name the file itself under `model`",
            )
        path = next(iter(models))
    if len(towers) > 1:
        names = ", ".join(file.name for file in towers)
        raise ArrieroError(f"holds several vision towers: {names}", where=str(folder), remedy="Leave one of them there")
    match = PART.fullmatch(path.name)
    if match is None:
        return [path], next(iter(towers), None)
    count = int(match["count"])
    parts = [folder / f"{match['stem']}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
    missing = [
        ArrieroError("is missing", where=str(part), remedy=f"Download {part.name} into {folder}")
        for part in parts
        if not part.is_file()
    ]
    raise_together(missing, f"the checkpoint {folder} is not complete")
    return parts, next(iter(towers), None)


def _tensors(files: list[GgufFile]) -> tuple[dict[str, WeightSource], Any]:
    """The tensors by canonical name, experts one by one, and the factors of the rotary frequencies."""
    tensors: dict[str, WeightSource] = {}
    factors, problems = None, []
    for file in files:
        for name, tensor in file.tensors():
            if name == ROPE_FACTORS:
                factors = np.asarray(tensor.data, np.float32)
                continue
            canonical = canonical_name(name)
            if canonical is None:
                problems.append(ArrieroError("no Llama 4 has such a tensor", where=f"{file.path}:{name}"))
                continue
            for source in _sources(file.path, canonical, tensor):
                if source.name in tensors:
                    what = f"is stored twice, first as {tensors[source.name].stored}"
                    problems.append(ArrieroError(what, where=source.stored))
                tensors[source.name] = source
    raise_together(problems, "the checkpoint's tensors are not those of a Llama 4")
    return tensors, factors


def _sources(path: Path, name: str, tensor: ReaderTensor) -> Iterator[MadeWeight]:
    """The tensor, or of a stack [E, N, K] each expert's matrix."""
    shape = tuple(int(size) for size in reversed(tensor.shape))
    data = np.asarray(tensor.data)
    if ".experts." in name and len(shape) == 3:
        for expert in range(shape[0]):
            stem, _, matrix = name.rpartition(".")
            yield _source(path, f"{stem}.{expert}.{matrix}.weight", tensor, shape[1:], data[expert])
    else:
        yield _source(path, name, tensor, shape, data)


def _source(path: Path, name: str, tensor: ReaderTensor, shape: tuple[int, ...], data: np.ndarray) -> MadeWeight:
    """A tensor of `shape`, of whose rows `data` has the bytes or values."""
    from gguf.quants import dequantize

    kind, stored = tensor.tensor_type.name, f"{tensor.name} in {path.name}"
    if kind in PLAIN:

        def plain(start: int, stop: int) -> np.ndarray:
            values = np.ascontiguousarray(data[start:stop] if shape else data)
            return values.view(NUMPY_DTYPES[kind]).reshape(stop - start, *shape[1:])

        return MadeWeight(name, shape, kind, stored, kind.lower(), plain)

    def decode(start: int, stop: int) -> Floats:
        return np.asarray(dequantize(data[start:stop], tensor.tensor_type), np.float32).reshape(
            stop - start, *shape[1:]
        )

    if not _is_decoded(tensor.tensor_type):
        what = f"is stored as {kind}, which the gguf package does not decode"
        raise ArrieroError(what, where=f"{path}:{tensor.name}", remedy="Take a file of another quantisation")
    held = {"Q8_0": _q8_0, "Q4_0": _q4_0}.get(kind)
    codes = None
    if held is not None and len(shape) == 2:
        bits, read = held(data, shape[1])
        codes = StoredCodes(bits, BLOCK, read, "F16")
    return MadeWeight(name, shape, "F32", stored, kind.lower(), decode, codes)


@functools.cache
def _is_decoded(kind: GGMLQuantizationType) -> bool:
    """Whether the package decodes this number format; it says so when it is asked to, here of one block."""
    from gguf.constants import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _q8_0(data: np.ndarray, features: int) -> tuple[int, Any]:
    """Blocks of an f16 scale and 32 signed bytes."""

    def read(start: int, stop: int) -> Quantized:
        blocks = np.ascontiguousarray(data[start:stop]).reshape(stop - start, -1, 2 + BLOCK)
        scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0].astype(np.float32)
        packed = (blocks[..., 2:] ^ np.uint8(0x80)).reshape(stop - start, features)
        return Quantized(packed, scales, 8, BLOCK)

    return 8, read


def _q4_0(data: np.ndarray, features: int) -> tuple[int, Any]:
    """Blocks of an f16 scale and 16 bytes: the low halves are the first 16 values, the high ones the others."""

    def read(start: int, stop: int) -> Quantized:
        blocks = np.ascontiguousarray(data[start:stop]).reshape(stop - start, -1, 2 + BLOCK // 2)
        scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0].astype(np.float32)
        codes = np.concatenate([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], -1).reshape(stop - start, features)
        return Quantized(codes[:, 0::2] | (codes[:, 1::2] << 4), scales, 4, BLOCK)

    return 4, read


def _side_files(keys: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, str]:
    """What stands beside a tokenizer: as the file's keys have it, else ours."""
    made = default_side_files(config.get("vision_config"))
    if template := keys.get(TEMPLATE):
        made["chat_template.jinja"] = template
    settings = json.loads(made["tokenizer_config.json"])
    tokens = keys.get("tokenizer.ggml.tokens") or []
    for name in ("bos", "eos", "padding"):
        number = keys.get(f"tokenizer.ggml.{name}_token_id")
        if number is not None and number < len(tokens):
            settings["pad_token" if name == "padding" else f"{name}_token"] = tokens[number]
    if "tokenizer.ggml.add_bos_token" in keys:
        settings["add_bos_token"] = keys["tokenizer.ggml.add_bos_token"]
    return made | {"tokenizer_config.json": json.dumps(settings, indent=2)}


def _named_templates(keys: Mapping[str, Any]) -> dict[str, str]:
    """The file's templates for special uses, where Hugging Face's tools look for them."""
    start = f"{TEMPLATE}."
    named = {key.removeprefix(start): text for key, text in keys.items() if key.startswith(start)}
    # a name of letters alone leads out of no folder
    return {f"{TEMPLATES}/{re.sub('[^0-9A-Za-z_]', '_', name)}.jinja": str(text) for name, text in named.items()}


def _tokenizer(keys: Mapping[str, Any], where: str) -> str:
    """The text of the tokenizer.json that the file's keys stand for."""
    if whole := keys.get("tokenizer.huggingface.json"):
        return str(whole)
    split = keys.get("tokenizer.ggml.pre")
    if keys.get("tokenizer.ggml.model") != "gpt2" or split not in SPLITS:
        what = f"is of kind {keys.get('tokenizer.ggml.model')!r} and splits text as {split!r} does"
        remedy = "Convert the model again with today's llama.cpp"
        raise ArrieroError(what, where=f"{where}:tokenizer.ggml", expected=f"gpt2 and {SPLITS[0]}", remedy=remedy)
    lists = (keys.get(f"tokenizer.ggml.{name}") for name in ("tokens", "merges", "token_type"))
    return tokenizer_json(*(one or [] for one in lists))
