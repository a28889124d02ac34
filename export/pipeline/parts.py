"""The typed parts of a manifest on their way: each stage leaves its own as `part.json`, assembling merges them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from arriero.runtimes.typed_json import decode
from arriero.strict_json import read_json_object

PART = "part.json"
T = TypeVar("T")


def write_part(part: Any, folder: Path) -> str:
    """Leave a stage's part of the manifest in its folder, and give the file's name."""
    (folder / PART).write_text(json.dumps(asdict(part)))
    return PART


def read_part(kind: type[T], folder: Path) -> T:
    """The part of type `kind` that the stage in `folder` left. Raises ArrieroError where it does not fit."""
    path = folder / PART
    remedy = "Delete the folder and build again"
    return decode(kind, read_json_object(path, remedy), str(path), remedy)
