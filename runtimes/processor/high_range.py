"""High dynamic range: brightness that no byte can hold, told by the number of a transfer curve (ITU-T H.273)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import IO

from PIL import Image

from arriero.errors import ArrieroError

HIGH_RANGE = {16: "PQ", 18: "HLG"}  # the curves by their numbers


def check_range(transfer: int | None, kind: str, name: str, remedy: str) -> None:
    """Refuse a picture or a video, as `kind` says, whose transfer curve is one of HIGH_RANGE."""
    if transfer in HIGH_RANGE:
        raise ArrieroError(
            f"the {kind} is of high dynamic range ({HIGH_RANGE[transfer]})",
            where=name,
            expected="standard dynamic range",
            remedy=remedy,
        )


def transfer_of(image: Image.Image) -> int | None:
    """The number of the transfer curve that a picture names, None where it names none.

    It stands in a colour profile, in the chunk cICP of a PNG or in the boxes of an AVIF. Of the last two nothing is
    left in a Pillow image once it is loaded.
    """
    file: IO[bytes] | None = getattr(image, "fp", None)
    search = {"PNG": _of_png, "AVIF": _of_avif}.get(image.format or "")
    named = None
    if file is not None and search is not None:
        at = file.tell()
        named = search(file)
        file.seek(at)
    profile = image.info.get("icc_profile")
    return _of_profile(profile) if named is None and isinstance(profile, bytes) else named


def _of_png(file: IO[bytes]) -> int | None:
    file.seek(8)
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind == b"cICP":
            return _byte(file.read(length), 1)
        if kind in (b"IDAT", b"IEND"):
            break
        file.seek(length + 4, 1)
    return None


def _of_profile(profile: bytes) -> int | None:
    """Of the tag cicp of an ICC profile: its type, four bytes, and a byte each for primaries and transfer."""
    for at in range(132, 132 + 12 * min(_number(profile[128:132]), 100), 12):
        kind, start = profile[at : at + 4], _number(profile[at + 4 : at + 8])
        if kind == b"cicp":
            return _byte(profile, start + 9)
    return None


def _of_avif(file: IO[bytes]) -> int | None:
    """Of the box colr that belongs to the primary item: others are those of a second, brighter rendering."""
    file.seek(0)
    meta = _first(_boxes(file.read()), b"meta")[4:]
    item = _number(_first(_boxes(meta), b"pitm")[4:])
    properties = list(_boxes(_first(_boxes(meta), b"iprp")))
    owned = list(_boxes(_first(iter(properties), b"ipco")))
    for number in (number for kind, content in properties if kind == b"ipma" for number in _associated(content, item)):
        kind, content = owned[number - 1] if 0 < number <= len(owned) else (b"", b"")
        if kind == b"colr" and content[:4] == b"nclx":
            return _number(content[6:8])
    return None


def _boxes(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The boxes of ISO's media file format in `content`: their kinds, and what is in them."""
    at = 0
    while at + 8 <= len(content):
        size, kind, head = _number(content[at : at + 4]), content[at + 4 : at + 8], 8
        if size == 1:
            size, head = _number(content[at + 8 : at + 16]), 16
        end = at + size if size else len(content)
        if end < at + head:
            return
        yield kind, content[at + head : end]
        at = end


def _first(boxes: Iterator[tuple[bytes, bytes]], kind: bytes) -> bytes:
    return next((content for each, content in boxes if each == kind), b"")


def _associated(box: bytes, item: int) -> Iterator[int]:
    """The numbers, from 1, of the properties that a box ipma gives to `item`."""
    wide_items, wide_numbers = _byte(box, 0) or 0, (_byte(box, 3) or 0) & 1
    at = 8
    for _ in range(_number(box[4:8])):
        size = 4 if wide_items else 2
        owner, count = _number(box[at : at + size]), _byte(box, at + size)
        if count is None:
            return
        at += size + 1
        for _ in range(count):
            number = _number(box[at : at + 1 + wide_numbers])
            if owner == item:
                yield number & (0x7FFF if wide_numbers else 0x7F)  # the first bit says whether it is essential
            at += 1 + wide_numbers


def _number(content: bytes) -> int:
    return int.from_bytes(content, "big")


def _byte(content: bytes, at: int) -> int | None:
    return content[at] if at < len(content) else None
