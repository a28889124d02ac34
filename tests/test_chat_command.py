"""`arriero chat`: turns, pictures, commands, and a conversation that goes on in another process."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from arriero.runtimes.api import load
from tests.command import Result, arriero

TURNS = ("What is the wind like?", "And the waves?")


@pytest.fixture
def bundle(workshop: Path) -> Path:
    return workshop / "bundles" / "fp32"


def talk(bundle: Path, *lines: str, options: tuple[str | Path, ...] = ()) -> Result:
    done = arriero("chat", bundle, "--max-tokens", "8", *options, stdin="".join(f"{line}\n" for line in lines))
    assert done.code == 0, done.err
    return done


def reads(done: Result) -> list[tuple[int, ...]]:
    """Per turn the tokens read and those read before."""
    return [tuple(map(int, pair)) for pair in re.findall(r"(\d+) tokens read, (\d+) read before, TTFT", done.err)]


def test_turns_are_those_of_a_conversation_and_read_their_own_words(bundle: Path) -> None:
    done = talk(bundle, *TURNS, options=("--system", "Be brief."))
    with load(bundle) as session:
        chat = session.chat([{"role": "system", "content": "Be brief."}], max_tokens=8)
        assert done.out == "".join(f"{chat.send(turn).text}\n" for turn in TURNS)
    (first, none), (second, before) = reads(done)
    assert none == 0
    assert before == first + 7  # the last of eight tokens was chosen, not read
    assert 0 < second < first


def test_a_conversation_is_written_and_goes_on(bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.npz"
    first = talk(bundle, TURNS[0], f"/save {file}", TURNS[1])
    for done in (talk(bundle, TURNS[1], options=("--resume", file)), talk(bundle, f"/load {file}", TURNS[1])):
        assert done.out.splitlines() == first.out.splitlines()[1:]
        assert reads(done) == reads(first)[1:]
        assert f"user: {TURNS[0]}" in done.err


def test_pictures_go_with_the_next_turn(bundle: Path, tmp_path: Path) -> None:
    Image.fromarray(np.full((40, 60, 3), 30, np.uint8)).save(tmp_path / "a.png")
    done = talk(bundle, f"/image {tmp_path / 'a.png'}", TURNS[0], TURNS[1])
    plain = talk(bundle, *TURNS)
    shown, alone = reads(done), reads(plain)
    assert shown[0][0] > alone[0][0]
    assert shown[1][0] == alone[1][0]


def test_commands_that_cannot_be_done_say_why_and_the_conversation_goes_on(bundle: Path, tmp_path: Path) -> None:
    lines = (
        "/image nowhere.png",
        "/fly",
        "/save",
        "/load nowhere",
        f"/save {tmp_path / 'x'}",
        "/help",
        "/new",
        "/stats",
    )
    done = talk(bundle, *lines, TURNS[0], "/exit", TURNS[1])
    for sentence in (
        "nowhere.png: there is no such image file",
        "there is no command /fly; expected /image, /save",
        "/save needs a path. Write /save PATH",
        "nowhere: there is no such file",
        "nothing has been said yet",
        "/stats        tokens read",
        "0 tokens read, 0 read before, 0 chosen in 0 answers",
    ):
        assert sentence in done.err
    assert len(done.out.splitlines()) == 1  # what follows /exit is not read


def test_a_file_that_cannot_be_written_or_read_costs_no_conversation(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no conversation")
    lines = (f"/save {tmp_path / 'none' / 'x'}", f"/save {tmp_path}", f"/load {tmp_path}", f"/load {tmp_path / 'file'}")
    done = talk(bundle, TURNS[0], *lines, TURNS[1])
    assert len(reads(done)) == 2
    assert f"{tmp_path / 'none' / 'x'}: the conversation cannot be written (No such file or directory)" in done.err
    assert f"{tmp_path}: the conversation cannot be written (Is a directory). Give a path that can" in done.err
    assert done.err.count("this is no saved conversation of the model") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
