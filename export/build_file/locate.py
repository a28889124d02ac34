"""Finds the checkpoint that a build file means: a path, `hf://` in the local Hugging Face cache, or `synthetic://`."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from arriero.errors import ArrieroError, MachineLacks
from arriero.graphs.sources.synthetic import SyntheticModel
from arriero.runtimes.home import expand_home
from arriero.runtimes.inside import leads_out

MODELS = "a folder, hf://organisation/name or synthetic://name"
HUB = re.compile(r"hf://(?P<org>[\w.-]+)/(?P<name>[\w.-]+?)(?:@(?P<revision>[\w./-]+))?")


def resolve_model(model: str, folder: Path) -> Path | SyntheticModel:
    """Give the checkpoint of `model`: a folder, a .gguf file, or a synthetic model. Never downloads.

    Relative paths start at `folder`. Raises `ArrieroError` for what cannot be right, `MachineLacks` for a model that is
    not in the cache.
    """
    if model.startswith("synthetic:"):
        return SyntheticModel.parse(model)
    if model.startswith("hf:"):
        return _in_cache(model)
    path = (folder / expand_home(model)).absolute()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.exists():
        remedy = f"Write the folder: {Path(model).parent}"
        raise ArrieroError(f"{model} is a file", expected="the folder of a checkpoint", remedy=remedy)
    siblings = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    remedy = (
        f"Did you mean {Path(model).with_name(near[0])}?" if near else f"Relative paths start at {folder.absolute()}"
    )
    raise ArrieroError(f"there is no folder {path}", expected=MODELS, remedy=remedy)


def hub_cache() -> Path:
    """The folder in which Hugging Face tools keep downloaded models, by their own rules."""
    if cache := os.environ.get("HF_HUB_CACHE"):
        return expand_home(cache, "HF_HUB_CACHE")
    if home := os.environ.get("HF_HOME"):
        return expand_home(home, "HF_HOME") / "hub"
    return expand_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "XDG_CACHE_HOME") / "huggingface" / "hub"


def _in_cache(model: str) -> Path:
    match = HUB.fullmatch(model)
    if match is None or ".." in (match["revision"] or "").split("/"):  # which would lead out of the cache
        remedy = "For example hf://meta-llama/Llama-4-Scout-17B-16E-Instruct"
        raise ArrieroError(f"{model!r} is malformed", expected="hf://organisation/name[@revision]", remedy=remedy)
    org, name, revision = match.group("org", "name", "revision")
    repository = hub_cache() / f"models--{org}--{name}"
    command = f"hf download {org}/{name}" + (f" --revision {revision}" if revision else "")
    remedy = f"With a network, run `{command}`, then build again"
    if not repository.is_dir():
        raise MachineLacks(f"{model} is not in the Hugging Face cache {repository.parent}", remedy=remedy)
    reference = repository / "refs" / (revision or "main")
    _check_inside(repository, [reference], command)
    commit = reference.read_text().strip() if reference.is_file() else revision or "main"
    snapshot = repository / "snapshots" / commit
    _check_inside(repository, [snapshot, *(sorted(snapshot.rglob("*")) if snapshot.is_dir() else ())], command)
    if not snapshot.is_dir():
        held = sorted(p.name for p in (repository / "snapshots").glob("*"))
        seen = f"; it holds {', '.join(held)}" if held else ""
        what = f"the Hugging Face cache {repository} does not hold revision {revision or 'main'}{seen}"
        raise MachineLacks(what, remedy=remedy)
    if not any(file for name in ("config.json", "params.json", "*.gguf") for file in snapshot.glob(name)):
        raise MachineLacks(f"the download of {model} in {snapshot} is incomplete: no config.json", remedy=remedy)
    return snapshot


def _check_inside(repository: Path, paths: Iterable[Path], command: str) -> None:
    for path in paths:
        if leads_out(path, repository):
            raise ArrieroError(
                f"{path} leads out of the cached model's folder",
                expected=f"files in {repository}, as `hf download` leaves them",
                remedy=f"Delete the folder {repository} and run `{command}`",
            )
