"""A line that says whether it still is what was written: the sha256 of its text, a space, and the text."""

from __future__ import annotations

import hashlib


def sealed(text: bytes) -> bytes:
    """The line of `text`, without an end of line."""
    return hashlib.sha256(text).hexdigest().encode() + b" " + text


def opened(line: bytes) -> bytes | None:
    """The text of a line; None if it was changed or cut."""
    text = line.partition(b" ")[2]
    return text if sealed(text) == line else None
