"""Conversations: a turn reads its own tokens, what was said stays, a file brings it back."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import arriero
from arriero.errors import ArrieroError
from arriero.export.proof.reference import TorchBackend
from arriero.runtimes.chat_session import Chat
from arriero.runtimes.place import Place
from arriero.runtimes.processor.processor import Processor, Prompt
from arriero.runtimes.session import Session
from arriero.runtimes.settings import read_settings
from tests.runtimes.gate import Gate
from tests.toys import load_reference

Open = Callable[[], Session]
SYSTEM = [{"role": "system", "content": "You are a sailor, and you say little. Keep to the sea and to its weather."}]
TURNS = ("What is the wind like?", "And the waves?", "Where will we be tomorrow, then?", "Good night.")


@pytest.fixture(params=["onnxruntime", "tvm", "reference"])
def open_session(request: pytest.FixtureRequest) -> Iterator[Open]:
    """Sessions over one small model without a prefix cache: a conversation needs none."""
    workshop = request.getfixturevalue("tvm_workshop" if request.param == "tvm" else "workshop")
    folder, opened = workshop / "bundles" / "fp32", []

    def open_one() -> Session:
        session = arriero.load(folder, threads=2, prefix_cache=0)
        if request.param == "reference":
            session.close()
            backend = TorchBackend.of(load_reference(workshop / "scout"))
            processor = Processor(folder / "tokenizer", backend.spec)
            session = Session(backend, processor, session.context, 2, identity="reference")
        opened.append(session)
        return session

    yield open_one
    for session in opened:
        session.close()


def check_fresh(chat: Chat, session: Session) -> None:
    """The chances of what follows are those of a row that reads all of the conversation at once."""
    place = chat._place
    assert place is not None
    fresh = session.generate(Prompt(place.ids, place.tiles), max_tokens=4, logprobs=5)
    read = session.stats().prefilled_tokens
    request = session.request(Prompt(place.ids, place.tiles), read_settings({"max_tokens": 4, "logprobs": 5}), None)
    request.place = place
    kept = session.submit(request).wait()
    assert session.stats().prefilled_tokens - read <= len(place.ids) - place.snapshot.length + 1
    assert fresh.token_ids == kept.token_ids
    assert fresh.logprobs is not None
    assert kept.logprobs is not None
    chances = [[value for entry in g.logprobs or () for _, value in entry.top] for g in (fresh, kept)]
    np.testing.assert_allclose(*chances, atol=1e-5)


def test_a_turn_reads_its_own_tokens_and_goes_on_as_a_fresh_reading(open_session: Open) -> None:
    session = open_session()
    chat = session.chat(SYSTEM, max_tokens=20)
    reads = []
    for turn in TURNS:
        before = session.stats().prefilled_tokens
        answer = chat.send(turn)
        reads.append(session.stats().prefilled_tokens - before)
        assert chat.messages[-2:] == [{"role": "user", "content": turn}, {"role": "assistant", "content": answer.text}]
        check_fresh(chat, session)
    assert answer.prompt_tokens > session.spec.attention_chunk_size
    answered = [*SYSTEM, {"role": "assistant", "content": ""}]
    own = [len(session.encode_turn([*answered, {"role": "user", "content": turn}]).input_ids) for turn in TURNS]
    assert reads[1:] == [count + 1 for count in own[1:]]  # an answer's last token was chosen, not read


def test_a_conversation_with_pictures_is_saved_and_goes_on_elsewhere(open_session: Open, tmp_path: Path) -> None:
    session, file = open_session(), tmp_path / "talk.npz"
    pictures = [np.full((40, 60, 3), shade, np.uint8) for shade in (20, 200)]
    chat = session.chat(SYSTEM, max_tokens=12)
    chat.send("What is this?", pictures[0])
    chat.send("And this?", images=[pictures[1]])
    check_fresh(chat, session)
    chat.save(file)
    expected = [chat.send(turn).token_ids for turn in TURNS]
    other = open_session()
    resumed = other.load_chat(file)
    assert len(resumed.messages) == 5
    assert resumed.messages[1]["content"] == [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    read = other.stats()
    assert [resumed.send(turn).token_ids for turn in TURNS] == expected
    assert other.stats().reused_tokens - read.reused_tokens > 4 * len(chat._place.ids) / 3  # type: ignore[union-attr]
    assert resumed.messages == chat.messages


# --- over the toy


@pytest.fixture
def session(toy: Any, processor: Processor) -> Iterator[Session]:
    with Session(toy, processor, 400, 3, ("one",), identity="toy") as opened:
        yield opened


def test_an_answers_tokens_stay_whatever_its_text_would_be(session: Session) -> None:
    """Drawn at random, bytes make letters that are encoded otherwise, and stop texts leave tokens out of the text."""
    for settings in ({"temperature": 1.5, "seed": 3}, {"stop": "e"}, {"logit_bias": {257: 100.0}}):
        chat = session.chat(max_tokens=15, **settings)
        for turn in ("Hello", "there"):
            before = session.stats().reused_tokens
            answer = chat.send(turn)
        assert chat._place is not None
        assert session.stats().reused_tokens > before
        ids = chat._place.ids.tolist()
        closed = answer.token_ids[-1] == 257
        assert ids[len(ids) - len(answer.token_ids) + closed :] == answer.token_ids[: len(answer.token_ids) - closed]


def test_streams_of_threads_and_tasks_are_turns_once_they_are_read(session: Session, toy: Any) -> None:
    chat, gate = session.chat(max_tokens=10), Gate(toy)
    stream = chat.stream("Hello")
    with pytest.raises(ArrieroError, match="still being answered"):
        chat.send("again")
    gate.open(10_000)
    assert chat.messages == []
    text = stream.wait().text
    assert [message["content"] for message in chat.messages] == ["Hello", text]

    async def read() -> str:
        return "".join([piece async for piece in chat.stream("you")])

    assert asyncio.run(read()) == chat.messages[-1]["content"]
    assert len(chat.messages) == 4


def test_a_turn_that_cannot_work_leaves_the_conversation_as_it_was(session: Session) -> None:
    chat = session.chat(max_tokens=5)
    chat.send("Hello")
    messages, place = list(chat.messages), chat._place
    for message, settings in (("x" * 500, {}), ({"role": "captain", "content": "x"}, {}), ("x", {"adapter": "two"})):
        with pytest.raises(ArrieroError):
            chat.send(message, **settings)
        assert (chat.messages, chat._place) == (messages, place)
    assert chat.send("again").text


def test_another_adapter_reads_all_of_it_again(session: Session) -> None:
    chat = session.chat(max_tokens=5)
    chat.send("Hello")
    before = session.stats().reused_tokens
    chat.send("again", adapter="one")
    assert session.stats().reused_tokens == before
    chat.send("and again", adapter="one")
    assert session.stats().reused_tokens > before


def test_what_is_no_conversation_of_the_bundle_is_refused(
    session: Session, toy: Any, processor: Processor, tmp_path: Path
) -> None:
    chat, file = session.chat(max_tokens=5, temperature=0.5, seed=2), tmp_path / "talk.npz"
    with pytest.raises(ArrieroError, match="nothing has been said"):
        chat.save(file)
    chat.send("Hello")
    chat.save(file)
    assert [path.name for path in tmp_path.iterdir()] == ["talk.npz"]
    assert session.load_chat(file).send("x").token_ids == chat.send("x").token_ids
    with Session(toy, processor, 400, identity="other") as other, pytest.raises(ArrieroError, match="another bundle"):
        other.load_chat(file)
    with pytest.raises(ArrieroError, match="there is no such file"):
        session.load_chat(tmp_path / "none")
    content = file.read_bytes()
    for bad in (b"", b"not a file of arrays", content[: len(content) // 2]):
        file.write_bytes(bad)
        with pytest.raises(ArrieroError, match="no saved conversation"):
            session.load_chat(file)
    with np.load(io.BytesIO(content)) as arrays:
        np.savez(file, **{**arrays, "key.1": arrays["key.1"][:, :3]})
    with pytest.raises(ArrieroError, match="keys and values are not those of"):
        session.load_chat(file)
    with np.load(io.BytesIO(content)) as arrays:
        for name, value in (("ids", arrays["ids"].astype(np.float32)), ("head", np.frombuffer(b"[", np.uint8))):
            np.savez(file, **{**arrays, name: value})
            with pytest.raises(ArrieroError, match="no saved conversation"):
                session.load_chat(file)
        head = json.loads(arrays["head"].tobytes())
        whole = head["said"]
        for said in ([], {}, {**whole, "messages": "x"}, {**whole, "messages": [3]}, {**whole, "settings": 3}):
            changed = np.frombuffer(json.dumps({**head, "said": said}).encode(), np.uint8)
            np.savez(file, **{**arrays, "head": changed})
            with pytest.raises(ArrieroError, match="no saved conversation"):
                session.load_chat(file)


def test_a_file_that_unpacks_to_more_than_its_size_is_refused_unread(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat, file = session.chat(max_tokens=2), tmp_path / "talk.npz"
    chat.send("Hi")
    chat.save(file)
    with np.load(file) as arrays:
        np.savez_compressed(file, **{**arrays, "key.0": np.zeros(1 << 24, np.float32)})
    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", lambda *_: pytest.fail("an array was read"))
    with pytest.raises(ArrieroError, match="it is compressed, and holds more than its own size"):
        session.load_chat(file)


@pytest.mark.parametrize("messages", ["x", 3, [3], {"role": "user"}])
def test_what_opens_a_conversation_is_a_list_of_messages(session: Session, messages: Any) -> None:
    with pytest.raises(ArrieroError, match=r"messages is .*; expected a list of messages"):
        session.chat(messages)


def test_a_byte_that_flipped_anywhere_in_a_saved_conversation_is_no_traceback(
    session: Session, toy: Any, tmp_path: Path
) -> None:
    chat, file = session.chat(max_tokens=2), tmp_path / "talk.npz"
    chat.send("Hi")
    chat.save(file)
    content, refused = bytearray(file.read_bytes()), 0
    places = set(range(len(content)))
    with np.load(file) as arrays:
        for name in arrays.files:  # of what is covered by a checksum, a few bytes say as much as all
            start = content.index(arrays[name].tobytes())
            places -= set(range(start + 2, start + arrays[name].nbytes))
    for at in sorted(places):
        bit = 1 << at % 8
        content[at] ^= bit
        file.write_bytes(content)
        content[at] ^= bit
        try:
            place, _ = Place.load(file, toy.spec)
        except ArrieroError:
            refused += 1
        else:  # what changed is a date or the like
            np.testing.assert_array_equal(place.ids, chat._place.ids)
    assert refused > len(places) // 2
