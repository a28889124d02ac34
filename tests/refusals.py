"""Cases of bad input: changes for the worse to a folder, and the check of the message that refuses them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.command import Result
from tests.small import edit_json

Change = Callable[[Any], Any]  # of a folder, or of the text of a build file
ORIGINAL = "original checkpoint"


def case(change: Change, what: str, where: str, remedy: str, code: int = 2) -> Any:
    """A change for the worse, and what its message must say; named after `change`."""
    return pytest.param(change, what, where, remedy, code, id=change.__name__.strip("_").replace("_", "-"))


def check(result: Result, what: str, where: str, remedy: str, code: int = 2) -> None:
    assert result.code == code, result
    assert "Traceback" not in result.err
    told = " ".join(re.sub("[│╭╰╮╯─]", " ", result.err).split())  # out of the box that frames a wrong option
    for part in (what, where, remedy):
        assert re.search(part, told), f"{part!r} is not in {told!r}"


def setting(name: str, file: str, **changes: Any) -> Change:
    def change(folder: Path) -> None:
        edit_json(folder / file, **changes)

    change.__name__ = name
    return change


def content(name: str, file: str, new: bytes | None) -> Change:
    def change(folder: Path) -> None:
        (folder / file).unlink()
        if new is not None:
            (folder / file).write_bytes(new)

    change.__name__ = name
    return change


def cut(name: str, file: str, share: float) -> Change:
    def change(folder: Path) -> None:
        os.truncate(folder / file, int(share * (folder / file).stat().st_size))

    change.__name__ = name
    return change


def flip(name: str, file: str, at: float) -> Change:
    def change(folder: Path) -> None:
        data = bytearray((folder / file).read_bytes())
        data[int(at * len(data))] ^= 1
        (folder / file).write_bytes(data)

    change.__name__ = name
    return change
