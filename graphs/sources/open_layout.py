"""Which layout a checkpoint has: the module that reads it is told by the files that are there."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from arriero.errors import ArrieroError
from arriero.graphs.sources.layout import Layout


def open_layout(path: Path) -> Layout:
    """Open the checkpoint at `path`. Raises as the layout's module does."""
    if not path.is_dir() and path.suffix != ".gguf":
        what = "is a file, not a folder" if path.exists() else "there is no such folder"
        remedy = "Give the folder that holds config.json and the safetensors files"
        raise ArrieroError(what, where=str(path), expected="a checkpoint folder", remedy=remedy)
    # Imported when it is needed: each layout brings the library that reads its files.
    layout: Layout = import_module(f"arriero.graphs.sources.{_kind(path)}").open_folder(path)
    return layout


def _kind(path: Path) -> str:
    if path.is_file() or (not (path / "config.json").exists() and any(path.glob("*.gguf"))):
        return "gguf"
    return "hugging_face"
