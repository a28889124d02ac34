"""Which layout a checkpoint has: the files that are there decide which module reads it."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from arriero.errors import ArrieroError
from arriero.graphs.sources.layout import Layout
from arriero.graphs.sources.synthetic import SyntheticModel, open_synthetic

ENDINGS = (".safetensors", ".gguf", ".pth")


def open_layout(path: Path | SyntheticModel) -> Layout:
    """Open the checkpoint at `path`. Raises as the layout's module does."""
    if isinstance(path, SyntheticModel):
        return open_synthetic(path)
    if not path.is_dir() and not (path.is_file() and path.suffix == ".gguf"):
        what = "is a file, not a folder" if path.exists() else "there is no such folder"
        remedy = "Give the folder that holds config.json and the safetensors files, or a .gguf file"
        raise ArrieroError(what, where=str(path), expected="a checkpoint folder", remedy=remedy)
    # Imported when it is needed: each layout brings the library that reads its files.
    layout: Layout = import_module(f"arriero.graphs.sources.{_kind(path)}").open_folder(path)
    return layout


def weight_bytes(path: Path | SyntheticModel) -> int:
    """What the files with weights at `path` take on disk, of whatever layout; reads none of them.

    A synthetic model has none: what they would take.
    """
    if isinstance(path, SyntheticModel):
        return sum(source.nbytes for source in open_synthetic(path).tensors.values())
    files = [path] if path.is_file() else [file for ending in ENDINGS for file in path.glob(f"*{ending}")]
    return sum(file.stat().st_size for file in files)


def _kind(path: Path) -> str:
    """The layout's module. Config.json may lie beside any of them, weights of two layouts may not."""
    if path.is_file():
        return "gguf"
    if any(path.glob("*.safetensors")) or any(path.glob("*.safetensors.index.json")):
        return "hugging_face"
    if any(path.glob("*.gguf")):
        return "gguf"
    if (path / "params.json").is_file() and any(path.glob("consolidated*.pth")):
        return "meta"
    return "hugging_face"
