"""Sets of prompts that users bring: a JSONL file, or a folder of images.

A line of the file is an object with `prompt` (a text) or `messages` (as a session takes them: text, image and video
entries, pictures by path), and optionally `answer`. What the assistant says last in `messages` is the answer too. An
image of a folder is asked one question, and no answer is known. Paths start at the file's folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from arriero.errors import ArrieroError, Problems, nearest, placed
from arriero.export.samples.image_folder import read_folder
from arriero.runtimes.processor.pictures import read_image
from arriero.runtimes.processor.video import FRAMES, MOST_FRAMES, read_video
from arriero.runtimes.proof.parity_case import ParityCase
from arriero.runtimes.proof.scorers import SAME_ANSWER

EXAMPLE = '{"prompt": "What is 17 + 25?", "answer": "42"}'
ROLES = ("system", "user", "assistant")
ENTRIES = {"text": ("type", "text"), "image": ("type", "path"), "video": ("type", "path", "num_frames")}


def read_cases(path: Path) -> list[ParityCase]:
    """Every sample of the file or folder `path`, in its order, named `file:line` or after its picture.

    Raises ArrieroError/Problems with all mistakes, each at its line: pictures that are missing; once anything is
    wrong, those that cannot be read too. What nothing else is wrong with is read when it is encoded.
    """
    if path.is_dir():
        return read_folder(path)
    reader = _Lines(path)
    cases = list(reader.read())
    if reader.problems:
        problems = sorted([*reader.problems, *_unreadable(cases)], key=_line)
        raise Problems(f"{path} has mistakes", problems)
    if not cases:
        raise ArrieroError("the file holds no prompts", where=str(path), expected=f"lines such as {EXAMPLE}")
    return cases


def entries_of(case: ParityCase) -> Iterator[Mapping[str, Any]]:
    """The text, image and video entries of a case that is given as messages."""
    for message in () if isinstance(case.prompt, str) else case.prompt:
        if not isinstance(message["content"], str):
            yield from message["content"]


class _Lines:
    """A JSONL file on its way to cases, and the problems found."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.problems: list[ArrieroError] = []

    def read(self) -> Iterator[ParityCase]:
        """Give the case of every line that is sound."""
        if not self.file.is_file():  # a device might never end
            remedy = "Give a JSONL file, or a folder of images"
            raise ArrieroError("is no file", where=str(self.file), expected="a regular file", remedy=remedy)
        try:
            text = self.file.read_text("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ArrieroError(
                f"is not UTF-8 text (byte {error.start})",
                where=str(self.file),
                expected=f"JSONL, a line such as {EXAMPLE}",
                remedy="Save it as UTF-8; a folder of images is given by the folder's path",
            ) from None
        # JSON may hold U+2028 and its like as they are, so only line feeds end a line.
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            before = len(self.problems)
            case = self._case(number, line)
            if case is not None and len(self.problems) == before:
                yield case

    def _wrong(self, what: str, at: str, expected: str | None = None, remedy: str | None = None) -> None:
        self.problems.append(ArrieroError(what, where=f"{self.file}:{at}", expected=expected, remedy=remedy))

    def _case(self, number: int, line: str) -> ParityCase | None:
        at = str(number)
        try:
            data = json.loads(line)
            json.dumps(data, ensure_ascii=False).encode()  # half a surrogate pair is JSON, and is no text
        except (ValueError, RecursionError) as error:
            self._wrong(f"is not JSON ({error})", at, f"one object per line, such as {EXAMPLE}")
            return None
        if not isinstance(data, dict):
            self._wrong(f"is {type(data).__name__}, not an object", at, f"one object per line, such as {EXAMPLE}")
            return None
        self._keys(data, ("prompt", "messages", "answer"), at)
        if ("prompt" in data) == ("messages" in data):
            what = "has both prompt and messages" if "prompt" in data else "has no prompt"
            self._wrong(what, at, "one of `prompt` (a text) and `messages` (in chat form)")
            return None
        answer = self._text(data["answer"], f"{at}: answer") if "answer" in data else ""
        if "prompt" in data:
            prompt: Any = self._text(data["prompt"], f"{at}: prompt")
        else:
            prompt, said = self._messages(data["messages"], f"{at}: messages")
            if said and answer:
                self._wrong("has two answers", at, "`answer`, or an assistant's last message", "Remove one of them")
            answer = answer or said
        return _as_case(f"{self.file.name}:{number}", prompt, answer)

    def _keys(self, data: Mapping[str, Any], known: tuple[str, ...], at: str) -> None:
        for key in data:
            if key not in known:
                self._wrong(f"unknown key {key!r}", at, f"one of {', '.join(known)}", nearest(key, list(known)))

    def _text(self, value: Any, at: str) -> str:
        if isinstance(value, str) and value.strip():
            return value
        self._wrong(f"{_short(value)} is not a text" if value not in ("", None) else "is empty", at, "some text")
        return ""

    def _messages(self, messages: Any, at: str) -> tuple[list[dict[str, Any]], str]:
        """The messages up to where the answer begins, pictures by absolute path; and the answer, if it is there."""
        if not isinstance(messages, list) or not messages:
            self._wrong(f"{_short(messages)} is no conversation", at, 'a list of {"role": ..., "content": ...}')
            return [], ""
        read = [self._message(message, f"{at}[{number}]") for number, message in enumerate(messages)]
        answer = ""
        if read[-1]["role"] == "assistant":
            last = read.pop()["content"]
            if isinstance(last, list) and len(last) == 1:
                last = last[0].get("text")
            answer = self._text(last, f"{at}[{len(read)}].content")
            if not read:
                self._wrong("nothing comes before the assistant's answer", at, "a question")
        return read, answer

    def _message(self, message: Any, at: str) -> dict[str, Any]:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            self._wrong(f"{_short(message)} is no message", at, '{"role": ..., "content": ...}')
            return {"role": None, "content": []}
        self._keys(message, ("role", "content"), at)
        role, content = message["role"], message["content"]
        if role not in ROLES:
            self._wrong(f"{_short(role)} is no role", f"{at}.role", f"one of {', '.join(ROLES)}")
        if isinstance(content, list) and content:
            content = [self._entry(entry, f"{at}.content[{number}]") for number, entry in enumerate(content)]
        else:
            content = self._text(content, f"{at}.content")
        return {"role": role, "content": content}

    def _entry(self, entry: Any, at: str) -> dict[str, Any]:
        kind = entry.get("type") if isinstance(entry, dict) else None
        if not isinstance(kind, str) or kind not in ENTRIES:
            expected = '{"type": "text", "text": ...}, {"type": "image", "path": ...} or {"type": "video", "path": ...}'
            self._wrong(f"{_short(entry)} is no entry", at, expected, nearest(str(kind), list(ENTRIES)))
            return {"type": "text", "text": ""}
        self._keys(entry, ENTRIES[kind], at)
        if kind == "text":
            return {"type": "text", "text": self._text(entry.get("text"), f"{at}.text")}
        read: dict[str, Any] = {"type": kind, "path": self._path(entry.get("path"), f"{at}.path", kind)}
        if kind == "video":
            frames = read["num_frames"] = entry.get("num_frames", FRAMES)
            if not isinstance(frames, int) or isinstance(frames, bool) or not 1 <= frames <= MOST_FRAMES:
                expected = f"a whole number from 1 to {MOST_FRAMES:,}"
                self._wrong(f"{_short(frames)} is no number of frames", f"{at}.num_frames", expected)
        return read

    def _path(self, value: Any, at: str, kind: str) -> str:
        text = self._text(value, at)
        folder = self.file.absolute().parent
        path = folder / text
        try:
            there, inside = path.is_file(), path.resolve().is_relative_to(folder.resolve())
        except (OSError, ValueError, RuntimeError):  # too long a name, one with a zero byte, a link to itself
            there, inside = False, True
        if text and not inside:
            remedy = "Copy the file into the folder: a set is what lies there, wherever it is carried to"
            self._wrong(f"the {kind} {_short(text)} lies outside the set's folder", at, f"a file in {folder}", remedy)
        elif text and not there:
            near = sorted(file.name for file in path.parent.iterdir()) if path.parent.is_dir() else []
            remedy = nearest(path.name, near) or "Paths start at the folder of the JSONL file"
            self._wrong(f"there is no {kind} {_short(text)}", at, remedy=remedy)
        return str(path)


def _as_case(name: str, prompt: Any, answer: str) -> ParityCase:
    kinds = {entry["type"] for entry in entries_of(ParityCase(name, "", prompt))}
    family = "video" if "video" in kinds else "image" if "image" in kinds else "text"
    return ParityCase(name, family, prompt, (), answer, SAME_ANSWER if answer else "")


def _unreadable(cases: Iterable[ParityCase]) -> Iterator[ArrieroError]:
    """Open every picture of sound lines, beside lines that are not sound: one list of all that is to be mended."""
    for case in cases:
        for entry in entries_of(case):
            try:
                if entry["type"] == "image":
                    read_image(entry["path"])
                elif entry["type"] == "video":
                    read_video(entry["path"], entry["num_frames"])
            except ArrieroError as error:
                yield placed(error, case.name)


def _line(problem: ArrieroError) -> int:
    parts = (problem.where or "").split(":")
    return next((int(part) for part in parts[1:] if part.isdigit()), 0)


def _short(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
