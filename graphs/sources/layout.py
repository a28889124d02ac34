"""An opened checkpoint, whatever its layout: what the modules that know a layout give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arriero.graphs.sources.weight_source import WeightSource


@dataclass(frozen=True)
class Layout:
    """`config` as Hugging Face's config.json has it, `tensors` by canonical name, and the files that hold them.

    `side` is the folder that holds tokenizer, processor settings and chat template, or None where the layout has no
    such files; then `made` has them, name -> text.
    """

    name: str
    config: dict[str, Any]
    tensors: dict[str, WeightSource]
    weight_files: list[Path]
    side: Path | None
    made: Mapping[str, str] = field(default_factory=dict)
