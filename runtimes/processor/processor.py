"""Prompts and images to what a model takes, and its ids back to text: tokenizer, chat template, image tiles."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from arriero.errors import ArrieroError
from arriero.runtimes.backend import Floats, Ints, ModelSpec, VisionSpec
from arriero.runtimes.processor.chat import ChatTemplate, Message, as_messages, expand, find_template
from arriero.runtimes.processor.images import ImageLike, Images, Tiler, as_list, read_image

IMAGE, PATCH = "<|image|>", "<|patch|>"
IMAGE_TOKENS = (IMAGE, PATCH, "<|image_start|>", "<|image_end|>", "<|tile_x_separator|>", "<|tile_y_separator|>")
_ORIGINAL = "Take the file from the original checkpoint"


@dataclass(frozen=True)
class Prompt:
    """What a model takes: ids i64 [S], and f32 [n, 3, h, w] tiles for its image placeholders, or None."""

    input_ids: Ints
    pixel_values: Floats | None = None


class Processor:
    """The tokenizer folder of a checkpoint or bundle, at work. Safe to share between threads."""

    def __init__(self, folder: Path, spec: ModelSpec) -> None:
        """Read `folder` (tokenizer.json, its configs and templates) for the model `spec`."""
        self.spec = spec
        self._tokenizer = _read_tokenizer(folder / "tokenizer.json")
        config = _read_json(folder / "tokenizer_config.json")
        special = {key: _token_text(value) for key, value in config.items() if key.endswith("_token")}
        if "bos_token" not in special and spec.bos_token_id is not None:
            special["bos_token"] = self._tokenizer.id_to_token(spec.bos_token_id)
        template = find_template(folder, config)
        self._template = (
            ChatTemplate(template[0], {k: v for k, v in special.items() if v is not None}, template[1])
            if template
            else None
        )
        size = self._tokenizer.get_vocab_size()
        if size > spec.vocab_size:
            raise ArrieroError(
                f"the tokenizer knows {size} tokens, the model {spec.vocab_size}",
                where=str(folder / "tokenizer.json"),
                remedy="The tokenizer belongs to another model: take the files of the original checkpoint",
            )
        unknown = [token for token in spec.eos_token_ids if self._tokenizer.id_to_token(token) is None]
        if unknown:
            raise ArrieroError(
                f"the tokenizer does not know the model's closing tokens {unknown}",
                where=str(folder / "tokenizer.json"),
                remedy="The tokenizer belongs to another model: take the files of the original checkpoint",
            )
        self._tiler: Tiler | None = None
        if spec.vision is not None:
            self._tiler = _read_tiler(folder, spec.vision.image_size)
            self._check_image_tokens(str(folder / "tokenizer.json"))
            _check_tile_tokens(folder / "processor_config.json", spec.vision)

    def _check_image_tokens(self, where: str) -> None:
        missing = [token for token in IMAGE_TOKENS if self._tokenizer.token_to_id(token) is None]
        if missing:
            raise ArrieroError(
                f"image tokens are missing: {', '.join(missing)}",
                where=where,
                expected="the tokenizer of a Llama 4 that sees",
                remedy=_ORIGINAL,
            )
        patch = self._tokenizer.token_to_id(PATCH)
        if patch != self.spec.image_token_id:
            raise ArrieroError(
                f"{PATCH} has id {patch}",
                where=where,
                expected=f"{self.spec.image_token_id}, the model's image token",
                remedy=_ORIGINAL,
            )

    def encode(self, prompt: str | Sequence[Message], images: Images = None) -> Prompt:
        """Give ids and tiles for a text or a list of messages, ending where the answer begins.

        A plain text becomes one user message. Images are Pillow images, paths, encoded bytes or uint8 arrays
        [h, w, 3], one or a list; each needs one image entry or `<|image|>` in the text. Without a chat template a
        plain text is encoded as it stands.
        """
        pictures = as_list(images)
        if isinstance(prompt, str) and not prompt:
            raise ArrieroError("the prompt is empty", expected="some text", remedy="Ask something")
        messages, shown = expand(as_messages(prompt, len(pictures), IMAGE), pictures, IMAGE)
        if not messages:
            raise ArrieroError("the list of messages is empty", expected="at least one message")
        if self._template is not None:
            return self.encode_text(self._template.render(messages), shown)
        if not isinstance(prompt, str):
            raise ArrieroError(
                "this model has no chat template, so it takes plain text only",
                remedy="Pass one string, or add chat_template.jinja to the checkpoint and rebuild",
            )
        text = prompt if IMAGE in prompt else IMAGE * len(shown) + prompt
        bos = None if self.spec.bos_token_id is None else self._tokenizer.id_to_token(self.spec.bos_token_id)
        return self.encode_text((bos or "") + text, shown)

    def encode_text(self, text: str, images: Sequence[ImageLike] = ()) -> Prompt:
        """Give ids and tiles for a rendered `text` whose `<|image|>`s stand for `images`, in order."""
        if text.count(IMAGE) != len(images):
            raise ArrieroError(
                f"the prompt has {text.count(IMAGE)} image placeholders and {len(images)} images were given",
                expected="as many of one as of the other",
                remedy=f"Give one image per image entry (or {IMAGE}) of the prompt",
            )
        if not images:
            return Prompt(self.tokenize(text))
        if self._tiler is None or self.spec.vision is None:
            raise ArrieroError(
                "this bundle has no vision tower, so it cannot read images",
                remedy="Build it with `modalities: [text, image]`",
            )
        tiles = [self._tiler.tile(read_image(image)) for image in images]
        layouts = iter(_layout(part.rows, part.columns, self.spec.vision.tokens_per_tile) for part in tiles)
        ids = self.tokenize(re.sub(re.escape(IMAGE), lambda _: next(layouts), text))
        pixel_values = np.concatenate([part.pixel_values for part in tiles])
        placeholders, features = int(np.sum(ids == self.spec.image_token_id)), len(pixel_values)
        features *= self.spec.vision.tokens_per_tile
        if placeholders != features:
            raise ArrieroError(
                f"the prompt has {placeholders} {PATCH} tokens and its images make {features}",
                remedy=f"Leave {PATCH} out of the prompt: it is the model's own placeholder",
            )
        return Prompt(ids, pixel_values)

    def tokenize(self, text: str) -> Ints:
        """Give the ids of `text` as it stands [S]: special tokens in it are recognised, none is added."""
        try:
            return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int64)
        except TypeError:  # of a str, only one that holds half of a surrogate pair
            raise ArrieroError(
                "the prompt holds what is no character", expected="text that can be written as UTF-8"
            ) from None

    def decode(self, ids: Sequence[int] | Ints, skip_special_tokens: bool = True) -> str:
        """Give the text of `ids`."""
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=skip_special_tokens)


def _layout(rows: int, columns: int, tokens: int) -> str:
    """Give the tokens that stand for one image: its tiles row by row, then the global tile."""
    tile = PATCH * tokens
    row = "<|tile_x_separator|>".join([tile] * columns) + "<|tile_y_separator|>"
    parts = row * rows if rows * columns > 1 else ""
    return f"<|image_start|>{parts}{IMAGE}{tile}<|image_end|>"


def _read_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise ArrieroError("the tokenizer is missing", where=str(path), remedy=_ORIGINAL)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ArrieroError(f"the tokenizer cannot be read ({error})", where=str(path), remedy=_ORIGINAL) from None
    # a saved tokenizer may carry the padding and truncation of its training run, which would cut prompts silently
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _read_tiler(folder: Path, image_size: int) -> Tiler:
    for name in ("preprocessor_config.json", "processor_config.json"):
        settings = _read_json(folder / name)
        settings = settings.get("image_processor", settings)
        if "size" in settings or "image_mean" in settings:
            tiler = Tiler.parse(settings, str(folder / name))
            if tiler.size != image_size:
                raise ArrieroError(
                    f"tiles are {tiler.size} pixels wide",
                    where=f"{folder / name}:size",
                    expected=f"{image_size}, the vision tower's input",
                    remedy=_ORIGINAL,
                )
            return tiler
    raise ArrieroError(
        "the image settings are missing",
        where=str(folder / "preprocessor_config.json"),
        expected="the size, image_mean and image_std of the checkpoint",
        remedy=_ORIGINAL,
    )


def _check_tile_tokens(path: Path, vision: VisionSpec) -> None:
    settings = _read_json(path)
    patch, ratio = settings.get("patch_size"), settings.get("pixel_shuffle_ratio")
    if patch is None or ratio is None:
        return
    try:
        tokens = (vision.image_size // patch) ** 2 // round(1 / ratio**2)
    except (TypeError, ArithmeticError):
        tokens = 0
    if tokens != vision.tokens_per_tile:
        raise ArrieroError(
            f"patch_size {patch} and pixel_shuffle_ratio {ratio} make {tokens} tokens per tile",
            where=str(path),
            expected=f"{vision.tokens_per_tile}, as the vision tower gives",
            remedy=_ORIGINAL,
        )


def _read_json(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArrieroError(f"this is not valid JSON ({error})", where=str(path), remedy=_ORIGINAL) from None
    if not isinstance(content, dict):
        raise ArrieroError("the content is no mapping", where=str(path), expected="a JSON object", remedy=_ORIGINAL)
    return content


def _token_text(value: Any) -> str | None:
    return value.get("content") if isinstance(value, Mapping) else value
