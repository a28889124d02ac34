"""What the folders of a checkpoint and its adapters hold that a build does not take up, each with its reason."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from arriero.graphs.sources.layout import TEMPLATES, side_files
from arriero.strict_json import read_json_object

# Keys of generation_config.json that are no defaults of answers.
NEUTRAL = ("_from_model_config", "transformers_version", "eos_token_id", "bos_token_id", "pad_token_id", "use_cache")
VIDEO = "video_preprocessor_config.json"
REMEDY = "Take the file from the original checkpoint, or remove it"


def ignored_files(folder: Path, adapters: Iterable[Path] = ()) -> list[str]:
    """A sentence for each file or setting in `folder`, and in those of `adapters`, that other tools honour.

    Raises ArrieroError as `parse_json`.
    """
    sentences = []
    if (folder / VIDEO).is_file():
        sentences.append(f"{VIDEO} is ignored: Llama 4 has no video processor, frames are read as images")
    if code := sorted(file.name for file in folder.glob("*.py")):
        sentences.append(f"{', '.join(code)} is ignored: no code of a checkpoint is run")
    templates = sorted((folder / TEMPLATES).glob("*.jinja"))
    if others := [file.stem for file in templates if file.stem not in ("default", "tool_use")]:
        taken = "prompts take the default one, and with tools the one called tool_use"
        sentences.append(f"the chat templates {', '.join(others)} are ignored: {taken}")
    generation, tokenizer = folder / "generation_config.json", folder / "tokenizer_config.json"
    if generation.is_file():
        keys = sorted(key for key, value in read_json_object(generation, REMEDY).items() if value is not None)
        if set_here := [key for key in keys if key not in NEUTRAL]:
            told = "answers are greedy unless whoever asks says otherwise"
            sentences.append(f"generation_config.json: {', '.join(set_here)} ignored: {told}")
    if tokenizer.is_file() and read_json_object(tokenizer, REMEDY).get("clean_up_tokenization_spaces") is True:
        told = "answers are the text that the model wrote"
        sentences.append(f"tokenizer_config.json: clean_up_tokenization_spaces ignored: {told}")
    return sentences + [sentence for adapter in adapters for sentence in _of_adapter(adapter, folder)]


def _of_adapter(adapter: Path, folder: Path) -> list[str]:
    """The same of an adapter's folder, for what is not in `folder` byte for byte."""
    differing = [name for name in side_files(adapter) if not _is_same(adapter / name, folder / name)]
    told = "an adapter brings weights alone; what a bundle is to have belongs beside the model's weights"
    return [f"{', '.join(differing)} of {adapter} ignored: {told}"] if differing else []


def _is_same(file: Path, other: Path) -> bool:
    return other.is_file() and file.read_bytes() == other.read_bytes()
