"""JSON of files that others wrote, read with one kind of error for all that can be wrong with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arriero.errors import ArrieroError


def parse_json(
    text: str | bytes, where: str, remedy: str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:
    """The value that `text` spells; `pairs` makes what an object becomes. Raises ArrieroError at `where` and its line.

    That holds for what is no UTF-8, for numbers of thousands of digits, and for nesting that no reader can follow.
    """
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8"), object_pairs_hook=pairs)
    except UnicodeDecodeError as error:
        what = f"is not UTF-8 text (byte {error.start})"
    except json.JSONDecodeError as error:
        what, where = f"is not valid JSON ({error.msg})", f"{where}:{error.lineno}"
    except RecursionError:
        what = "is not valid JSON (it is nested too deeply)"
    except ValueError as error:  # a number of more digits than Python converts
        what = f"is not valid JSON ({error})"
    raise ArrieroError(what, where=where, expected="JSON", remedy=remedy) from None


def check_characters(text: str, where: str) -> None:
    """Refuse a text that UTF-8 cannot spell: JSON's escapes can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ArrieroError("holds half of a surrogate pair", where=where, expected="text") from None


def read_json_object(path: Path, remedy: str) -> dict[str, Any]:
    """The object in the file `path`. Raises ArrieroError as `parse_json`, and for another value."""
    try:
        content = parse_json(path.read_bytes(), str(path), remedy)
    except OSError as error:
        what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise ArrieroError(what, where=str(path), remedy=remedy) from None
    if not isinstance(content, dict):
        raise ArrieroError("is not a JSON object", where=str(path), expected="a JSON object", remedy=remedy)
    return content
