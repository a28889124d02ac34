"""An opened checkpoint, whatever its layout: what the modules that know a layout give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arriero.errors import ArrieroError
from arriero.graphs.sources.weight_source import WeightSource

TEMPLATES = "additional_chat_templates"  # the folder of templates that have names
SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    f"{TEMPLATES}/default.jinja",
    f"{TEMPLATES}/tool_use.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)
"""Files beside the weights which a bundle takes over, so that a change in one is a change of the checkpoint."""


def side_files(folder: Path) -> list[str]:
    """The names of the side files that `folder` has."""
    return [name for name in SIDE_FILES if (folder / name).is_file()]


def files_beside(folder: Path) -> dict[str, str]:
    """The texts of the side files that `folder` has, for layouts that are made without them. Raises ArrieroError."""
    texts = {}
    for name in side_files(folder):
        try:
            texts[name] = (folder / name).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            what = f"is not UTF-8 text (byte {error.start})"
            raise ArrieroError(what, where=str(folder / name), remedy="Copy the file again") from None
    return texts


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
