"""Chat messages as users write them, checked, and made the plain data that chat templates take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypedDict

from arriero.errors import ArrieroError
from arriero.runtimes.processor.documents import read_document
from arriero.runtimes.processor.pictures import ImageLike
from arriero.runtimes.processor.video import FRAMES, MOST_FRAMES, read_video
from arriero.strict_json import parse_json

Message = Mapping[str, Any]
Records = Sequence[Mapping[str, Any]] | None
MOST_DEPTH = 100  # of what a message holds besides its content, such as the arguments of a tool call


class ChatOptions(TypedDict, total=False):
    """What a chat template takes beside the messages: see `Processor.encode`."""

    tools: Records
    documents: Records
    continue_final_message: bool


def as_messages(prompt: str | Sequence[Message], images: int, placeholder: str | None) -> list[Message]:
    """Wrap a plain `prompt` as one user message; its images come first unless it holds `placeholder`s itself."""
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise ArrieroError(f"the prompt is a {type(prompt).__name__}", expected="a text or a list of messages")
    if not isinstance(prompt, str):
        return list(prompt)
    if not images or (placeholder is not None and placeholder in prompt):
        return [{"role": "user", "content": prompt}]
    entries = [{"type": "image"}] * images
    return [{"role": "user", "content": [*entries, {"type": "text", "text": prompt}]}]


def as_records(value: Records, name: str) -> list[dict[str, Any]] | None:
    """Give `tools` or `documents`, whichever `name` says, as plain data."""
    if value is None:
        return None
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence):
        raise ArrieroError(f"{name} is a {type(value).__name__}", expected="a list of mappings")
    for number, record in enumerate(value):
        if not isinstance(record, Mapping):
            what, where = f"is a {type(record).__name__}", f"{name}[{number}]"
            expected = "a function's JSON schema" if name == "tools" else "a mapping with title and text"
            raise ArrieroError(what, where=where, expected=expected)
    return [_plain(record, f"{name}[{number}]") for number, record in enumerate(value)]


def expand(
    messages: Sequence[Message],
    images: Sequence[ImageLike],
    placeholder: str | None,
    knows_role: Callable[[Any], object],
    most_frames: int = MOST_FRAMES,
) -> tuple[list[dict[str, Any]], list[ImageLike]]:
    """Give the messages as plain data, and their images in order of appearance.

    An image entry brings its own picture as `image` or `path`, or takes the next of `images`; so does each
    `placeholder` in a text, unless it is None. A video entry becomes one image entry per frame, a document entry one
    per page. Raises `ArrieroError` for an unknown entry, for a role that `knows_role` does not, and for a video or a
    document of more than `most_frames`.
    """
    pending = iter(images)
    plain: list[dict[str, Any]] = []
    shown: list[ImageLike] = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        calls = isinstance(message, Mapping) and message.get("tool_calls")
        if not isinstance(message, Mapping) or "role" not in message or not (calls or "content" in message):
            raise ArrieroError("a message is malformed", where=where, expected="a mapping with role and content")
        if not knows_role(message["role"]):
            raise ArrieroError(
                f"there is no role {message['role']!r}",
                where=f"{where}.role",
                expected="system, user, assistant, tool, or another one that the chat template names",
            )
        content = message.get("content")
        if isinstance(content, str):
            shown += _taken(content, pending, placeholder)
        elif content is None and calls:
            pass  # an assistant's message that only calls tools
        elif message["role"] in ("tool", "ipython") and isinstance(content, Mapping):
            content = _plain(content, where)  # what a tool gave, which templates write as JSON
        else:
            if not isinstance(content, Sequence) or isinstance(content, bytes):
                raise ArrieroError("the content is malformed", where=where, expected="a text or a list of entries")
            entries: list[dict[str, str]] = []
            for index, entry in enumerate(content):
                added, pictures = _expand_entry(entry, f"{where}.content[{index}]", pending, placeholder, most_frames)
                entries += added
                shown.extend(pictures)
            content = entries
        others = {str(key): _plain(value, where) for key, value in message.items() if key != "content"}
        if calls:
            others["tool_calls"] = _with_arguments(others["tool_calls"], f"{where}.tool_calls")
        plain.append({**others, "content": content})
    # images too many are handed on: the processor compares the counts
    return plain, [*shown, *pending]


def _taken(text: str, pending: Iterator[ImageLike], placeholder: str | None) -> list[ImageLike]:
    return [] if placeholder is None else list(islice(pending, text.count(placeholder)))


def _expand_entry(
    entry: Any, where: str, pending: Iterator[ImageLike], placeholder: str | None, most_frames: int
) -> tuple[list[dict[str, str]], list[ImageLike]]:
    kind = entry.get("type") if isinstance(entry, Mapping) else None
    if kind == "text" and isinstance(entry.get("text"), str):
        return [{"type": "text", "text": entry["text"]}], _taken(entry["text"], pending, placeholder)
    if kind == "image":
        picture = next((entry[key] for key in ("image", "path") if entry.get(key) is not None), None)
        if picture is None:
            picture = next(pending, None)
        return [{"type": "image"}], [] if picture is None else [picture]
    has_frames = kind == "video" and isinstance(entry.get("frames"), Iterable)
    if has_frames or (kind == "video" and entry.get("path") is not None):
        frames: list[ImageLike] = (
            list(islice(entry["frames"], most_frames + 1))
            if has_frames
            else [*read_video(entry["path"], entry.get("num_frames", FRAMES), most_frames)]
        )
        if len(frames) > most_frames:
            raise ArrieroError(f"the video has more than {most_frames} frames", where=where, remedy="Show fewer")
        if not frames:
            raise ArrieroError("the video has no frames", where=where, expected="at least one frame")
        return [{"type": "image"}] * len(frames), frames
    if kind == "document" and entry.get("path") is not None:
        pages = read_document(entry["path"], entry.get("pages"), most_frames)
        return [{"type": "image"}] * len(pages), [*pages]
    raise ArrieroError(
        f"the entry {_shown(entry)} is unknown",
        where=where,
        expected='{"type": "text", "text": ...}, {"type": "image", ["path" or "image"]}, '
        '{"type": "video", "frames" or "path"} or {"type": "document", "path"}',
    )


def _with_arguments(calls: Any, where: str) -> list[dict[str, Any]]:
    """Calls of tools with their arguments as mappings, which templates expect: OpenAI's API has them as JSON text."""
    if not isinstance(calls, list):
        raise ArrieroError(f"is {calls!r:.60}", where=where, expected="a list of calls")
    whole = []
    for number, call in enumerate(calls):
        place = f"{where}[{number}].function"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            expected = '{"type": "function", "function": {"name": ..., "arguments": ...}}'
            raise ArrieroError("the call is malformed", where=place, expected=expected)
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            remedy = "Write the arguments as a JSON object"
            arguments = _plain(parse_json(arguments, f"{place}.arguments", remedy), place)
        if not isinstance(arguments, dict):
            what = f"the arguments are a {type(arguments).__name__}"
            raise ArrieroError(what, where=f"{place}.arguments", expected="a JSON object, or its text")
        whole.append({**call, "function": {**function, "arguments": arguments}})
    return whole


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """Rebuild `value` from plain JSON types: templates come from strangers and must not reach live objects."""
    if depth > MOST_DEPTH:
        raise ArrieroError("the message is nested too deeply", where=where, expected=f"at most {MOST_DEPTH} levels")
    if isinstance(value, str):
        return str.__str__(value)
    if value is None or type(value) in (int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where, depth + 1) for item in value]
    return f"<{type(value).__name__}>"


def _shown(entry: Any) -> str:
    if isinstance(entry, Mapping):
        return f"of type {entry.get('type')!r} with keys {sorted(map(str, entry))}"
    return f"of {type(entry).__name__}"
