"""Seeded damage to files: of their bytes, of the JSON and YAML in them, of what stands in their place."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

BYTES = (0x00, 0xFF, 0x0A, 0x22, 0x7B, 0x80)
# What a value is replaced by: wrong types, edges of numbers, what readers choke on.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**30, 0.5, 1e308, -0.0),
    *("", "\u0000", "a" * 70_000, "../../etc/passwd", "{{ 1/0 }}", "false", "NaN", "\ud800"),
    *([], {}, [[]], [None], {"": None}, [0] * 4096),
)
WORDS = ("&a [*a]", "!!python/object:os.system x", "1e999", "- - -", "? :", "[", "}", "\t", "~", "0o17", "yes")


def flip(data: bytes, draw: random.Random) -> bytes:
    """Change a few bytes, most of them near the start, where headers are."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8, 64))):
        if changed:
            limit = len(changed) if draw.random() < 0.5 else min(len(changed), 256)
            changed[draw.randrange(limit)] = draw.choice((*BYTES, draw.randrange(256)))
    return bytes(changed)


def cut(data: bytes, draw: random.Random) -> bytes:
    """Lose the end, the start or a piece."""
    start, end = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    return draw.choice((data[:start], data[start:], data[:start] + data[end:], b""))


def insert(data: bytes, draw: random.Random) -> bytes:
    """Add bytes: noise, zeros, or the file's own."""
    at = draw.randrange(len(data) + 1)
    own = data[: draw.randrange(1, 4096)]
    return data[:at] + draw.choice((draw.randbytes(draw.randrange(1, 300)), bytes(1000), own)) + data[at:]


def change_json(data: bytes, draw: random.Random) -> bytes:
    """Replace, remove, double or nest a value of a JSON file; the damage of bytes where it is none."""
    try:
        value = json.loads(data)
    except ValueError:
        return flip(data, draw)
    places: list[tuple[Any, Any]] = []

    def collect(inner: Any) -> None:
        items = inner.items() if isinstance(inner, dict) else enumerate(inner) if isinstance(inner, list) else ()
        for key, item in list(items)[:200]:
            places.append((inner, key))
            collect(item)

    collect(value)
    if not places:
        return json.dumps(draw.choice(VALUES[:-1])).encode()
    holder, key = draw.choice(places)
    what = draw.randrange(5)
    if what == 0:
        del holder[key]
    elif what == 1:
        nested: Any = holder[key]
        for _ in range(draw.choice((1, 3, 200))):
            nested = [nested] if draw.random() < 0.5 else {"x": nested}
        holder[key] = nested
    elif what == 2 and isinstance(holder, dict):
        holder[draw.choice(("", "extra", "__class__", "a" * 500))] = holder[key]
    else:
        holder[key] = draw.choice(VALUES)
    text = json.dumps(value)
    if draw.random() < 0.1:  # what json.dumps never writes
        text = draw.choice((text.replace(":", ": NaN, ", 1), "[" * 100_000, re.sub(r"\d+", "9" * 5000, text, count=1)))
    return text.encode()


def change_text(data: bytes, draw: random.Random) -> bytes:
    """Change a line of a YAML or JSONL file: drop, double, indent, or put something else for a word of it."""
    lines = data.decode(errors="replace").split("\n")
    at = draw.randrange(len(lines))
    what = draw.randrange(5)
    if what == 0:
        del lines[at]
    elif what == 1:
        lines.insert(at, lines[draw.randrange(len(lines))])
    elif what == 2:
        lines[at] = " " * draw.randrange(9) + lines[at].strip()
    else:
        words = re.split(r"(\W+)", lines[at])
        words[draw.randrange(len(words))] = draw.choice((*WORDS, *(str(value)[:5000] for value in VALUES)))
        lines[at] = "".join(words)
    return "\n".join(lines).encode(errors="surrogatepass")


def replace_file(file: Path, draw: random.Random) -> None:
    """Put something else in the file's place: nothing, a folder, a link that leaves, one to itself, another's bytes."""
    others = [other for other in sorted(file.parent.iterdir()) if other.is_file() and other != file]
    file.unlink()
    match draw.randrange(5):
        case 0:
            file.mkdir()
        case 1:
            file.symlink_to("/dev/zero")
        case 2:
            file.symlink_to(file.name)
        case 3 if others:
            file.write_bytes(draw.choice(others).read_bytes())


def mutate(file: Path, draw: random.Random) -> str:
    """Damage `file` in one way; gives its name."""
    if draw.random() < 0.08:
        replace_file(file, draw)
        return "replace_file"
    ways: list[Callable[[bytes, random.Random], bytes]] = [flip, cut, insert]
    if file.suffix == ".json":
        ways += [change_json] * 7
    elif file.suffix in (".yaml", ".jsonl", ".jinja"):
        ways += [change_text] * 7
    way = draw.choice(ways)
    changed = way(file.read_bytes(), draw)
    file.unlink()  # it may be a link to the original's bytes
    file.write_bytes(changed)
    return way.__name__
