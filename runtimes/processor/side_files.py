"""The JSON files beside a tokenizer.json: what of them counts, read as Hugging Face's tools read them.

What those would honour and we do not is refused here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arriero.errors import ArrieroError, Problems
from arriero.runtimes.backend import VisionSpec
from arriero.runtimes.processor.chat_template import ChatTemplate, TemplateSource, find_templates
from arriero.runtimes.processor.images import Tiler
from arriero.runtimes.processor.vocabulary import ORIGINAL, Vocabulary
from arriero.strict_json import read_json_object

TOKENIZER, PROCESSOR, PREPROCESSOR = "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"
SPECIAL_MAP, ADDED = "special_tokens_map.json", "added_tokens.json"

# Settings of tokenizer_config.json that would change what a prompt becomes, with the one value that it has with us.
ONLY = {"split_special_tokens": False, "add_eos_token": False, "do_lower_case": False, "add_prefix_space": False}
# The tokens of an image, by the names under which processor_config.json may say others.
IMAGE_NAMES = {
    "image_token": "<|image|>",
    "fake_image_token": "<|image|>",
    "start_of_image_token": "<|image_start|>",
    "end_of_image_token": "<|image_end|>",
    "patch_token": "<|patch|>",
    "tile_x_separator_token": "<|tile_x_separator|>",
    "tile_y_separator_token": "<|tile_y_separator|>",
}


@dataclass(frozen=True)
class SideFiles:
    """The settings in a tokenizer folder, each {} without its file."""

    folder: Path
    tokenizer: Mapping[str, Any]
    special_map: Mapping[str, Any]
    added: Mapping[str, Any]
    processor: Mapping[str, Any]
    preprocessor: Mapping[str, Any]
    templates: Mapping[str, TemplateSource]

    @classmethod
    def read(cls, folder: Path) -> SideFiles:
        """Read `folder`. Raises ArrieroError for files that cannot be read, `Problems` for settings not honoured."""
        names = (TOKENIZER, SPECIAL_MAP, ADDED, PROCESSOR, PREPROCESSOR)
        tokenizer, special_map, added, processor, preprocessor = (
            read_json_object(folder / name, ORIGINAL) if (folder / name).is_file() else {} for name in names
        )
        templates = find_templates(folder, tokenizer, processor)
        files = cls(folder, tokenizer, special_map, added, processor, preprocessor, templates)
        if problems := [*files._refused()]:
            raise Problems("settings of the tokenizer that cannot be honoured", problems)
        return files

    def _refused(self) -> Iterator[ArrieroError]:
        config, where = self.tokenizer, f"{self.folder / TOKENIZER}"
        for key, value in ONLY.items():
            if key in config and config[key] not in (None, value):
                yield ArrieroError(f"is {config[key]!r}", where=f"{where}:{key}", expected=f"{value}", remedy=ORIGINAL)
        bos = config.get("add_bos_token")
        if bos is not None and not isinstance(bos, bool):
            yield ArrieroError(f"is {bos!r}", where=f"{where}:add_bos_token", expected="true or false", remedy=ORIGINAL)
        for key, token in IMAGE_NAMES.items():
            if self.processor.get(key, token) != token:
                what, where = f"is {self.processor[key]!r}", f"{self.folder / PROCESSOR}:{key}"
                yield ArrieroError(what, where=where, expected=repr(token), remedy=ORIGINAL)

    @property
    def starts_with_bos(self) -> bool:
        """Whether a text that no template makes begins with the bos token."""
        return self.tokenizer.get("add_bos_token") is not False

    def chat_templates(self, bos_token: str | None) -> dict[str, ChatTemplate]:
        """The templates with the special tokens that they may name; `bos_token` if no file names it."""
        named = dict(self.tokenizer)
        if "added_tokens_decoder" not in self.tokenizer:
            named |= self.special_map
        extra = named.get("extra_special_tokens")
        named |= extra if isinstance(extra, Mapping) else {}
        texts = {key: _token_text(value) for key, value in named.items() if key.endswith("_token")}
        texts = {"bos_token": bos_token} | {key: text for key, text in texts.items() if text is not None}
        tokens = {key: text for key, text in texts.items() if text is not None}
        return {name: ChatTemplate(source, tokens) for name, source in self.templates.items()}

    def check_added_tokens(self, vocabulary: Vocabulary) -> None:
        """Refuse tokens that a config adds or moves and the tokenizer does not have so."""
        decoder = self.tokenizer.get("added_tokens_decoder")
        problems = []
        if isinstance(decoder, Mapping):
            listed, name = [(_token_text(token), number) for number, token in decoder.items()], TOKENIZER
        else:
            listed, name = [*self.added.items()], ADDED
        for token, number in listed:
            there = vocabulary.id(token) if isinstance(token, str) else None
            if there is None or str(there) != str(number):
                what = f"the token {token!r} has id {number}, and in tokenizer.json {there or 'it is not there'}"
                problems.append(ArrieroError(what, where=str(self.folder / name), expected="one id", remedy=ORIGINAL))
        if problems:
            raise Problems("the tokenizer's files contradict each other", problems)

    def tiler(self, vision: VisionSpec) -> Tiler:
        """The image settings of a model that sees. Raises ArrieroError where they are missing or not the tower's."""
        _check_tile_tokens(self.folder / PROCESSOR, self.processor, vision)
        # Hugging Face's tools prefer what is nested in the processor's settings.
        inside = self.processor.get("image_processor")
        file, settings = (PREPROCESSOR, self.preprocessor) if inside is None else (PROCESSOR, inside)
        if not settings and {"size", "image_mean"} & self.processor.keys():
            file, settings = PROCESSOR, self.processor
        if not settings:
            raise ArrieroError(
                "the image settings are missing",
                where=str(self.folder / PREPROCESSOR),
                expected="the size, image_mean and image_std of the checkpoint",
                remedy=ORIGINAL,
            )
        tiler = Tiler.parse(settings, str(self.folder / file))
        if tiler.size != vision.image_size:
            raise ArrieroError(
                f"tiles are {tiler.size} pixels wide",
                where=f"{self.folder / file}:size",
                expected=f"{vision.image_size}, the vision tower's input",
                remedy=ORIGINAL,
            )
        return tiler


def _check_tile_tokens(path: Path, settings: Mapping[str, Any], vision: VisionSpec) -> None:
    patch, ratio = settings.get("patch_size"), settings.get("pixel_shuffle_ratio")
    if patch is None or ratio is None:
        return
    try:
        tokens = (vision.image_size // patch) ** 2 // round(1 / ratio**2)
    except (TypeError, ValueError, ArithmeticError):
        tokens = 0
    if tokens != vision.tokens_per_tile:
        raise ArrieroError(
            f"patch_size {patch} and pixel_shuffle_ratio {ratio} make {tokens} tokens per tile",
            where=str(path),
            expected=f"{vision.tokens_per_tile}, as the vision tower gives",
            remedy=ORIGINAL,
        )


def _token_text(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, Mapping) else value
    return text if isinstance(text, str) else None
