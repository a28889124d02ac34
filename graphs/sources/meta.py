"""Meta's own layout: consolidated.NN.pth, one per model-parallel rank, beside params.json and tokenizer.model.

The files are pickles; `torch.load` reads them as weights only, so that no code in them runs, and maps them. Legend: E
experts, H hidden, F expert width, R files.
"""

from __future__ import annotations

import codecs
import io
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from arriero.errors import ArrieroError, raise_together, sentence_of
from arriero.graphs.sources.layout import Layout, files_beside
from arriero.graphs.sources.llama4_defaults import default_side_files
from arriero.graphs.sources.made_weight import MadeWeight
from arriero.graphs.sources.meta_config import config_of
from arriero.graphs.sources.meta_names import UNUSED, Split, canonical_name
from arriero.graphs.sources.meta_params import MetaParams
from arriero.graphs.sources.meta_tokenizer import control_tokens, read_meta_tokenizer
from arriero.graphs.sources.safetensors_header import NUMPY_DTYPES
from arriero.graphs.sources.weight_source import WeightSource
from arriero.strict_json import parse_json, read_json_object

if TYPE_CHECKING:
    from torch import Tensor

PARAMS, TOKENIZER, TOKENIZER_JSON = "params.json", "tokenizer.model", "tokenizer.json"
FIRST_CONTROL = 200_000  # id of the first control token of the released models
SHARD = re.compile(r"consolidated(?:\.(\d+))?\.pth")
AGAIN = "Download the file again, from where Meta publishes it"


def open_folder(folder: Path) -> Layout:
    """The checkpoint in `folder`. Raises `Problems` for missing files and tensors that do not fit each other."""
    files = _shards(folder)
    where = str(folder / PARAMS)
    params = MetaParams.read(read_json_object(folder / PARAMS, AGAIN), where)
    shards = [_load(file) for file in files]
    tensors = _tensors(folder, files, shards, params)
    own = files_beside(folder)
    if TOKENIZER_JSON not in own and (folder / TOKENIZER).is_file():
        own[TOKENIZER_JSON] = read_meta_tokenizer(folder / TOKENIZER)
    try:
        config = config_of(params, tensors, _control_tokens(own, str(folder)), where)
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        what = f"holds a value of another kind than Llama 4's ({sentence_of(error)})"
        raise ArrieroError(what, where=where, remedy=AGAIN) from None
    beside = [file for name in (PARAMS, TOKENIZER, *own) if (file := folder / name).is_file()]
    return Layout(
        "Meta", config, tensors, [*beside, *files], None, default_side_files(config.get("vision_config")) | own
    )


def _control_tokens(own: Mapping[str, str], where: str) -> dict[str, int]:
    """The ids of the tokens that tokenizer.json adds to the vocabulary; those of the released models without one."""
    if TOKENIZER_JSON not in own:
        return {token: FIRST_CONTROL + number for number, token in enumerate(control_tokens())}
    content = parse_json(own[TOKENIZER_JSON].encode(), f"{where}/{TOKENIZER_JSON}", AGAIN)
    return {str(token["content"]): int(token["id"]) for token in content.get("added_tokens", ())}


def _shards(folder: Path) -> list[Path]:
    """The files in the order of their ranks."""
    numbered = {int(match[1] or 0): file for file in folder.iterdir() if (match := SHARD.fullmatch(file.name))}
    missing = [
        ArrieroError("is missing", where=str(folder / f"consolidated.{rank:02}.pth"), remedy=AGAIN)
        for rank in range(max(numbered) + 1)
        if rank not in numbered
    ]
    raise_together(missing, f"the checkpoint {folder} is not complete")
    if scales := sorted(file.name for kind in ("int4", "fp8") for file in folder.glob(f"{kind}_scales_*.pt")):
        raise ArrieroError(
            f"is quantised in Meta's own way ({scales[0]})",
            where=str(folder),
            expected="bfloat16 weights",
            remedy="Take the bfloat16 release, or the quantised one in Hugging Face's layout",
        )
    return [numbered[rank] for rank in sorted(numbered)]


def _load(file: Path) -> dict[str, Tensor]:
    """The tensors of one file, mapped. Raises ArrieroError for a file that is no checkpoint, or carries code."""
    import torch

    try:
        # Meta's files hold the states of layers as byte streams, which are data.
        with torch.serialization.safe_globals([io.BytesIO, bytes, codecs.encode]):
            held = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        called = re.search(r"GLOBAL (\S+)", str(error))
        what = f"wants {called[1]} to be called" if called else "is a pickle of more than tensors"
        raise ArrieroError(
            f"{what}, and code that a file brings is never run",
            where=str(file),
            expected="a file of tensors alone",
            remedy=AGAIN,
        ) from None
    except (MemoryError, RuntimeError, ValueError, EOFError, OSError, KeyError) as error:
        raise ArrieroError(f"cannot be read ({str(error)[:200]})", where=str(file), remedy=AGAIN) from None
    if not isinstance(held, dict):
        raise ArrieroError(f"holds a {type(held).__name__}", where=str(file), expected="tensors by name", remedy=AGAIN)
    return {str(name): value for name, value in held.items() if isinstance(value, torch.Tensor)}


def _tensors(
    folder: Path, files: list[Path], shards: list[dict[str, Tensor]], params: MetaParams
) -> dict[str, WeightSource]:
    """The tensors by canonical name, each put together of what the files hold of it."""
    problems: list[ArrieroError] = []
    for file, shard in zip(files, shards, strict=True):
        for name in sorted(shards[0].keys() ^ shard.keys()):
            problems.append(ArrieroError(f"{name} is not in all files", where=str(file), remedy=AGAIN))
    found: dict[str, tuple[str, Split, list[Tensor]]] = {}
    for name in shards[0] if not problems else ():
        if UNUSED.fullmatch(name):
            continue
        known = canonical_name(name)
        if known is None:
            problems.append(ArrieroError("no Llama 4 has such a tensor", where=f"{files[0]}:{name}"))
        else:
            found[known[0]] = (name, known[1], [shard[name] for shard in shards])
    raise_together(problems, f"the checkpoint {folder} is not sound")
    tensors: dict[str, WeightSource] = {}
    for canonical, (name, split, parts) in found.items():
        try:
            for source in _sources(canonical, f"{name} in {files[0].name}", split, parts, params):
                tensors[source.name] = source
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            what = f"has shape {list(parts[0].shape)} in {len(parts)} files, which params.json does not fit ({error})"
            problems.append(ArrieroError(what, where=f"{files[0]}:{name}", remedy=AGAIN))
    raise_together(problems, f"the checkpoint {folder} is not sound")
    return _join_gate_up(tensors)


def _sources(name: str, stored: str, split: Split, parts: list[Tensor], params: MetaParams) -> Iterator[MadeWeight]:
    """What one tensor of the files stands for: itself, or two or three of ours."""
    if split is Split.QKV:
        heads, kv_heads = params.heads, params.kv_heads
        size, rest = divmod(parts[0].shape[0] * len(parts), heads + 2 * kv_heads)
        if rest:
            raise ValueError(f"{heads} + 2 * {kv_heads} heads")
        sizes = [count * size // len(parts) for count in (heads, kv_heads, kv_heads)]
        pieces = [part.split(sizes) for part in parts]
        for letter, own in zip("qkv", zip(*pieces, strict=True), strict=True):
            yield _weight(f"{name}.{letter}_proj.weight", stored, list(own), 0)
    elif split is Split.GATE_UP:
        halves = [part.chunk(2) for part in parts]
        for matrix, own in zip(("gate", "up"), zip(*halves, strict=True), strict=True):
            yield _weight(f"{name}.{matrix}_proj.weight", stored, list(own), 0)
    elif split in (Split.EXPERT_IN, Split.EXPERT_OUT):
        stacks = [part.view(params.experts, -1, part.shape[-1]) for part in parts]
        yield _weight(name, stored, stacks, 2 if split is Split.EXPERT_IN else 1)
    elif split is Split.TURNED:
        yield _weight(name, stored, [parts[0].T], 0)
    elif split is Split.SAME:
        yield _weight(name, stored, parts[:1], 0)
    else:
        yield _weight(name, stored, parts, 1 if split is Split.COLUMNS else 0)


def _weight(name: str, stored: str, parts: list[Tensor], axis: int) -> MadeWeight:
    """A tensor of parts that follow each other along `axis`."""
    label = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[str(parts[0].dtype).removeprefix("torch.")]
    shape = list(parts[0].shape)
    shape[axis] = sum(part.shape[axis] for part in parts)
    if axis == 0:
        ends = np.cumsum([0, *(part.shape[0] for part in parts)])

        def make(start: int, stop: int) -> NDArray[Any]:
            spans = ((max(start - at, 0), min(stop - at, len(part))) for at, part in zip(ends, parts, strict=False))
            pieces = [_rows(part, *span) for part, span in zip(parts, spans, strict=True) if span[0] < span[1]]
            return np.concatenate(pieces) if pieces else _rows(parts[0], 0, 0)
    else:

        def make(start: int, stop: int) -> NDArray[Any]:
            return np.concatenate([_rows(part, start, stop) for part in parts], axis)

    return MadeWeight(name, tuple(shape), label, stored, label.lower(), make)


def _rows(part: Tensor, start: int, stop: int) -> NDArray[Any]:
    """Rows of a mapped tensor as numpy sees their dtype."""
    import torch

    rows = part[start:stop].contiguous()
    label = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[rows.dtype]
    return rows.view(torch.uint8).numpy().view(NUMPY_DTYPES[label]).reshape(rows.shape)


def _join_gate_up(tensors: dict[str, WeightSource]) -> dict[str, WeightSource]:
    """`tensors` with the stacks gate and up [E, H, F] of each layer side by side [E, H, 2F]."""
    joined: dict[str, WeightSource] = {}
    for name, source in tensors.items():
        if not name.endswith(".experts.gate"):
            if not name.endswith(".experts.up"):
                joined[name] = source
            continue
        stem, up = name.removesuffix(".gate"), tensors.get(f"{name.removesuffix('gate')}up")
        if up is None or up.shape != source.shape or up.dtype != source.dtype:
            raise ArrieroError("has no equal counterpart for the other half", where=source.stored, remedy=AGAIN)

        def make(start: int, stop: int, gate: WeightSource = source, up: WeightSource = up) -> NDArray[Any]:
            return np.concatenate([gate.rows(start, stop), up.rows(start, stop)], -1)

        experts, hidden, width = source.shape
        joined[f"{stem}.gate_up_proj"] = MadeWeight(
            f"{stem}.gate_up_proj", (experts, hidden, 2 * width), source.dtype, source.stored, source.form, make
        )
    return joined
