"""The journal of what an unfinished stage keeps: what was changed since is told once and is kept no longer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from arriero.profiles.journal import FILE, Journal, Region
from tests.flip import flip


def kept(folder: Path) -> Journal:
    """Two pieces in one file, and one with a note and no file."""
    values = np.arange(8, dtype=np.uint8)
    (folder / "w").write_bytes(values.tobytes())
    journal = Journal(folder)
    journal.keep("first", Region.holding("w", 0, values[:4]))
    journal.keep("last", Region.holding("w", 4, values[4:]))
    journal.keep("note", note={"tokens": 9})
    return journal


def test_what_was_kept_is_held_in_this_run_and_the_next(tmp_path: Path) -> None:
    for journal in (kept(tmp_path), Journal(tmp_path)):
        assert [journal.holds(piece) for piece in ("first", "last", "note", "other")] == [True, True, True, False]
        assert journal.entries["note"].note == {"tokens": 9}
    assert Region.whole(tmp_path, "w").bytes == 8


@pytest.mark.parametrize("how", ["flipped", "cut short", "gone"])
def test_a_piece_that_was_changed_is_told_once_and_kept_no_longer(tmp_path: Path, how: str) -> None:
    kept(tmp_path)
    if how == "flipped":
        flip(tmp_path / "w", 5)
    elif how == "cut short":
        (tmp_path / "w").write_bytes(bytes(range(7)))
    else:
        (tmp_path / "w").unlink()
    told: list[str] = []
    journal = Journal(tmp_path, told.append)
    assert journal.holds("first") == (how != "gone")
    assert not journal.holds("last")
    assert not journal.holds("last")
    assert told[-1] == (
        f"{tmp_path / 'w'}: last, which an unfinished run left, is not what was written; it is made again"
    )
    assert len(told) == 1 + (how == "gone")
    assert "last" not in Journal(tmp_path).entries


def test_a_forgotten_piece_is_not_kept(tmp_path: Path) -> None:
    kept(tmp_path).forget("first")
    assert set(Journal(tmp_path).entries) == {"last", "note"}


@pytest.mark.parametrize("line", [0, 1, 2])
def test_a_line_that_was_changed_says_nothing(tmp_path: Path, line: int) -> None:
    kept(tmp_path)
    starts = [0, *(at + 1 for at, byte in enumerate((tmp_path / FILE).read_bytes()) if byte == 10)]
    flip(tmp_path / FILE, starts[line] + 70)
    names = ["first", "last", "note"]
    assert list(Journal(tmp_path).entries) == names[:line] + names[line + 1 :]


def test_a_torn_line_is_in_nobodys_way(tmp_path: Path) -> None:
    kept(tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[:-9])
    Journal(tmp_path).keep("next", note=1)
    assert list(Journal(tmp_path).entries) == ["first", "last", "next"]
