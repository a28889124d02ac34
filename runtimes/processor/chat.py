"""Messages to one prompt text, through the checkpoint's own chat template, in jinja2's sandbox."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from arriero.errors import ArrieroError
from arriero.runtimes.processor.images import ImageLike
from arriero.runtimes.processor.video import read_video

Message = Mapping[str, Any]


class ChatTemplate:
    """A compiled chat template with the special tokens it may name."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], where: str) -> None:
        """Compile `source`; `special_tokens` such as bos_token are visible in it."""
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _now
        self._where, self._special_tokens = where, dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ArrieroError(
                f"the chat template is broken at line {error.lineno} ({error.message})",
                where=where,
                remedy="Take the chat template of the original checkpoint",
            ) from None

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """Give the prompt text for `messages`, ending where the assistant's answer begins."""
        try:
            return self._template.render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **self._special_tokens
            )
        except Exception as error:  # a template is a stranger's program: it may fail in any way
            raise ArrieroError(
                f"the chat template refuses these messages ({error})",
                where=self._where,
                expected="a list of {role, content} that alternates as the model was trained",
                remedy="Change the messages, or take the chat template of the original checkpoint",
            ) from None


def as_messages(prompt: str | Sequence[Message], images: int, image_token: str) -> list[Message]:
    """Wrap a plain `prompt` as one user message; its images come first unless it holds `image_token`s itself."""
    if not isinstance(prompt, Sequence):
        raise ArrieroError(f"the prompt is a {type(prompt).__name__}", expected="a text or a list of messages")
    if not isinstance(prompt, str):
        return list(prompt)
    if not images or image_token in prompt:
        return [{"role": "user", "content": prompt}]
    entries = [{"type": "image"}] * images
    return [{"role": "user", "content": [*entries, {"type": "text", "text": prompt}]}]


def expand(
    messages: Sequence[Message], images: Sequence[ImageLike], image_token: str
) -> tuple[list[Message], list[ImageLike]]:
    """Give the messages as plain data, and their images in order of appearance.

    An image entry brings its own picture as `image` or `path`, or takes the next of `images`, as each `image_token`
    in a text does. A video entry becomes one image entry per frame. Raises `ArrieroError` for an unknown entry.
    """
    pending = iter(images)
    plain: list[Message] = []
    shown: list[ImageLike] = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise ArrieroError("a message is malformed", where=where, expected="a mapping with role and content")
        content = message["content"]
        if isinstance(content, str):
            shown += islice(pending, content.count(image_token))
        else:
            if not isinstance(content, Sequence):
                raise ArrieroError("the content is malformed", where=where, expected="a text or a list of entries")
            entries: list[dict[str, str]] = []
            for index, entry in enumerate(content):
                added, pictures = _expand_entry(entry, f"{where}.content[{index}]", pending, image_token)
                entries += added
                shown.extend(pictures)
            content = entries
        others = {str(key): _plain(value) for key, value in message.items() if key != "content"}
        plain.append({**others, "content": content})
    # images too many are handed on: the processor compares the counts
    return plain, [*shown, *pending]


def _expand_entry(
    entry: Any, where: str, pending: Iterator[ImageLike], image_token: str
) -> tuple[list[dict[str, str]], list[ImageLike]]:
    kind = entry.get("type") if isinstance(entry, Mapping) else None
    if kind == "text" and isinstance(entry.get("text"), str):
        return [{"type": "text", "text": entry["text"]}], list(islice(pending, entry["text"].count(image_token)))
    if kind == "image":
        picture = next((entry[key] for key in ("image", "path") if entry.get(key) is not None), None)
        if picture is None:
            picture = next(pending, None)
        return [{"type": "image"}], [] if picture is None else [picture]
    has_frames = kind == "video" and isinstance(entry.get("frames"), Iterable)
    if has_frames or (kind == "video" and entry.get("path") is not None):
        frames: list[ImageLike] = (
            list(entry["frames"]) if has_frames else [*read_video(entry["path"], entry.get("num_frames", 8))]
        )
        if not frames:
            raise ArrieroError("the video has no frames", where=where, expected="at least one frame")
        return [{"type": "image"}] * len(frames), frames
    raise ArrieroError(
        f"the entry {_shown(entry)} is unknown",
        where=where,
        expected='{"type": "text", "text": ...}, {"type": "image", ["path" or "image"]} or '
        '{"type": "video", "frames" or "path"}',
    )


def _plain(value: Any) -> Any:
    """Rebuild `value` from plain JSON types: templates come from strangers and must not reach live objects."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return f"<{type(value).__name__}>"


def _shown(entry: Any) -> str:
    if isinstance(entry, Mapping):
        return f"of type {entry.get('type')!r} with keys {sorted(map(str, entry))}"
    return f"of {type(entry).__name__}"


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, sort_keys: bool = False) -> str:
    # jinja2's own filter escapes HTML, which no model was trained on
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def find_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> tuple[str, str] | None:
    """Give the template's source and where it stands, or None when the checkpoint has none."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8"), str(file)
        except UnicodeDecodeError as error:
            raise ArrieroError(
                f"the chat template is not UTF-8 text (byte {error.start})",
                where=str(file),
                remedy="Take the chat template of the original checkpoint",
            ) from None
    source = tokenizer_config.get("chat_template")
    if isinstance(source, list):
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, Mapping)}
        source = named.get("default")
    where = f"{folder / 'tokenizer_config.json'}:chat_template"
    return (source, where) if isinstance(source, str) else None
