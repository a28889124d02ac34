"""Assembles a bundle folder from finished stages and writes its manifest, the last file of all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from arriero.errors import ArrieroError
from arriero.export.pipeline.parts import PART
from arriero.export.pipeline.stages import read_record
from arriero.graphs.sources.layout import side_files
from arriero.graphs.stored.link_file import copy_file, link_file
from arriero.runtimes.backend import ModelSpec
from arriero.runtimes.integrity import open_manifest
from arriero.runtimes.manifest import (
    FILE,
    FORMAT,
    AdaptedPart,
    CalibratedPart,
    Chain,
    FileRecord,
    LoweredPart,
    Measured,
    ProofTerms,
    RoundedPart,
    Source,
    link,
    manifest_digest,
    parity_digest,
)
from arriero.runtimes.typed_json import decode
from arriero.version import __version__


def copy_tokenizer(checkpoint: Path, folder: Path) -> list[str]:
    """Copy what the processor needs from the checkpoint folder and give the names of the files.

    Raises `ArrieroError` without a tokenizer.json.
    """
    if not (checkpoint / "tokenizer.json").is_file():
        raise ArrieroError(
            "the checkpoint has no tokenizer.json",
            where=str(checkpoint),
            expected="the fast tokenizer file of a Hugging Face checkpoint",
            remedy="Fetch it from where the checkpoint came from",
        )
    folder.mkdir(exist_ok=True)
    names = side_files(checkpoint)
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(checkpoint / name, folder / name)
    return names


def copy_licenses(files: Sequence[Path], folder: Path) -> list[str]:
    """Copy the licence files of a checkpoint, if it has any, and give their names."""
    for file in files:
        folder.mkdir(exist_ok=True)
        shutil.copyfile(file, folder / file.name)
    return [file.name for file in files]


def assemble(stage: Path, folder: Path, *, copied: bool = False) -> dict[str, FileRecord]:
    """Put the files that a finished stage says it wrote into `folder`: `copied`, or hard links where possible.

    Gives what the stage recorded of each, by its path in `folder`.
    """
    recorded = {name: record for name, record in read_record(stage)["files"].items() if name != PART}
    files = decode(dict[str, FileRecord], recorded, str(stage), "Build it again")
    put = copy_file if copied else link_file
    for name in files:
        put(stage / name, folder / name)
    return files


@dataclass(frozen=True)
class Parts:
    """What the stages of one target say of its bundle, each its own part."""

    model: ModelSpec
    source: Source
    target: Mapping[str, Any]  # as the build file has it
    tools: Mapping[str, str]
    lowered: LoweredPart
    calibrated: CalibratedPart
    rounded: RoundedPart
    record: str  # the hash of the reference record
    proof: ProofTerms
    adapters: Mapping[str, AdaptedPart]
    kv_bytes_per_token: Mapping[str, int]
    measured: Measured


def write_manifest(
    partial: Path,
    parts: Parts,
    recorded_files: Mapping[str, FileRecord],
    checkpoint: str,
    profile: str,
    build: Mapping[str, str],
) -> None:
    """Write `manifest.json` over the files that are in `partial` now.

    `recorded_files` are those that a stage has hashed; the others are hashed here. `checkpoint` and `profile` are the
    hashes that the chain takes up, `build` the keys of the stages that made the bundle.
    """
    names = sorted(file.relative_to(partial).as_posix() for file in partial.rglob("*") if file.is_file())
    files = {name: recorded_files.get(name) or FileRecord.of(partial / name) for name in names if name != FILE}
    compiled = {key: value for key, value in asdict(parts.lowered.compiled).items() if key != "tools"}
    entries = {
        "format": FORMAT,
        "arriero": __version__,
        "name": parts.target["name"],
        "model": parts.model.entry(),
        "source": asdict(parts.source),
        "target": {**parts.target, **compiled},
        "build": dict(build),
        "record": parts.record,
        "proof": asdict(parts.proof),
        "adapters": {name: asdict(one) for name, one in parts.adapters.items()},
        "files": {name: record.entry() for name, record in files.items()},
        "tools": {**parts.tools, **parts.lowered.compiled.tools},
        "weights": {name: asdict(weight) for name, weight in parts.lowered.weights.items()},
        "calibrated": asdict(parts.calibrated),
        "rounded": asdict(parts.rounded),
        "kv_bytes_per_token": dict(parts.kv_bytes_per_token),
        "measured": asdict(parts.measured),
    }
    graph = link(checkpoint, build["graph"])
    decided = link(graph, profile)
    artifact = link(decided, manifest_digest(entries))
    recorded = link(artifact, parts.record)
    proven = link(recorded, parity_digest(files))
    entries["chain"] = asdict(Chain(checkpoint, graph, decided, artifact, recorded, proven))
    path = partial / f"{FILE}.partial"
    path.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    os.replace(path, partial / FILE)


def is_current(bundle: Path, build: Mapping[str, str]) -> bool:
    """Whether the published `bundle` was made by the stages named in `build` and is what it says."""
    try:
        return open_manifest(bundle).build == dict(build)
    except ArrieroError:
        return False
