"""Assembles a bundle folder from finished stages and writes its manifest, the last file of all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arriero.errors import ArrieroError
from arriero.graphs.checkpoint import SIDE_FILES
from arriero.graphs.stored.link_file import link_file
from arriero.runtimes.backend import ModelSpec
from arriero.runtimes.manifest import FORMAT, artifact_digest, file_sha256, link, open_manifest, parity_digest
from arriero.version import __version__


def copy_tokenizer(checkpoint: Path, folder: Path) -> None:
    """Copy what the processor needs from the checkpoint folder. Raises `ArrieroError` without a tokenizer.json."""
    if not (checkpoint / "tokenizer.json").is_file():
        raise ArrieroError(
            "the checkpoint has no tokenizer.json",
            where=str(checkpoint),
            expected="the fast tokenizer file of a Hugging Face checkpoint",
            remedy="Fetch it from where the checkpoint came from",
        )
    folder.mkdir(exist_ok=True)
    for name in SIDE_FILES:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, folder / name)


def assemble(stage: Path, partial: Path) -> None:
    """Fill `partial` anew with the files of a finished stage: hard links where possible, else copies."""
    if partial.exists():
        shutil.rmtree(partial)
    for file in sorted(stage.rglob("*")):
        if file.is_file() and file.name not in ("stage.json", "lowering.json"):
            link_file(file, partial / file.relative_to(stage))


def write_manifest(
    partial: Path,
    name: str,
    spec: ModelSpec,
    kept: Mapping[str, Any],
    chain: Mapping[str, str],
    record: str,
    build: Mapping[str, str],
) -> None:
    """Write `manifest.json` over the files that are in `partial` now.

    `kept` are the entries that come as they are (target, weights, coverage, measured, tools, kv_bytes_per_token),
    `chain` the links up to the profile, `record` the hash of the reference record, `build` the keys of the stages that
    made the bundle.
    """
    names = sorted(file.relative_to(partial).as_posix() for file in partial.rglob("*") if file.is_file())
    files = {
        name: {"bytes": (partial / name).stat().st_size, "sha256": file_sha256(partial / name)}
        for name in names
        if name != "manifest.json"
    }
    manifest = {
        "format": FORMAT,
        "arriero": __version__,
        "name": name,
        "model": spec.entry(),
        "build": dict(build),
        "record": record,
        "files": files,
        **kept,
    }
    artifact = link(chain["profile"], artifact_digest(manifest))
    recorded = link(artifact, record)
    proven = link(recorded, parity_digest(files))
    manifest["chain"] = {**chain, "artifact": artifact, "record": recorded, "parity": proven}
    path = partial / "manifest.json.partial"
    path.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    os.replace(path, partial / "manifest.json")


def is_current(bundle: Path, build: Mapping[str, str]) -> bool:
    """Whether the published `bundle` was made by the stages named in `build` and opens without complaint."""
    try:
        return bool(open_manifest(bundle).raw["build"] == dict(build))
    except ArrieroError:
        return False
