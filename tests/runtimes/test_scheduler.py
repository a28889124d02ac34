"""Requests that are answered together: what one of them computes is what it would alone, and none waits for another."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest

import arriero
from arriero.errors import ArrieroError
from arriero.export.proof.reference import TorchBackend
from arriero.runtimes import pace as pace_module
from arriero.runtimes import running_rows, scheduler
from arriero.runtimes.pace import Pace
from arriero.runtimes.processor.processor import Processor, Prompt
from arriero.runtimes.request import Request
from arriero.runtimes.scheduler import EngineLimits, Scheduler
from arriero.runtimes.session import Session
from arriero.runtimes.steps import NotFinite
from arriero.traits import PREFILL_PIECE
from tests.runtimes.conftest import PackingToy
from tests.runtimes.gate import Gate
from tests.toys import load_reference

SAME_BITS = ("tvm",)
PROMPTS = (
    "Say a word.",
    "Tell me a long story about a machine that reads other machines, and one that does not. " * 3,
    "What is 17 + 25?",
    "a",
    "List the colours of the rainbow, " * 4,
)


@pytest.fixture(params=["onnxruntime", "tvm", "reference"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def whole(request: pytest.FixtureRequest, kind: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    """A session of each backend over the same small model, with pieces small enough that prompts have several."""
    monkeypatch.setattr(pace_module, "LEAST", 8)
    workshop = request.getfixturevalue("tvm_workshop" if kind == "tvm" else "workshop")
    bundle = workshop / "bundles" / "fp32"
    with arriero.load(bundle, threads=2) as session:
        if kind != "reference":
            monkeypatch.setattr(session.backend, "piece", 24)
            session.engine._scheduler = Scheduler(session.spec, EngineLimits(6, session.context))
            yield session
            return
        backend = TorchBackend.of(load_reference(workshop / "scout"))
        monkeypatch.setattr(backend, "piece", 24)
        processor = Processor(bundle / "tokenizer", backend.spec)
        with Session(backend, processor, session.context, 6) as reference:
            yield reference


def likelihoods(generation: arriero.Generation) -> np.ndarray:
    assert generation.logprobs is not None
    return np.array([[entry.logprob, *(value for _, value in entry.top)] for entry in generation.logprobs])


def test_an_answer_is_the_same_whatever_is_answered_beside_it(whole: Session, kind: str) -> None:
    """Greedy and drawn, over chunks' edges; the chances of the tokens are bits that are the same on TVM."""
    picture = np.random.default_rng(0).integers(0, 255, (60, 90, 3)).astype(np.uint8)
    cases: list[dict[str, Any]] = [
        {"prompt": text, "max_tokens": 12 + 5 * number, "temperature": number % 2 * 0.8, "seed": 11, "logprobs": 3}
        for number, text in enumerate(PROMPTS)
    ]
    cases.append({**cases[0], "images": picture})
    alone = [whole.generate(**case) for case in cases]
    assert max(answer.prompt_tokens for answer in alone) > whole.spec.attention_chunk_size
    with ThreadPoolExecutor(len(cases)) as pool:
        together = list(pool.map(lambda case: whole.generate(**case), cases))
    for one, other in zip(alone, together, strict=True):
        assert one.token_ids == other.token_ids
        assert (one.text, one.finish_reason) == (other.text, other.finish_reason)
        if kind in SAME_BITS:
            assert np.array_equal(likelihoods(one), likelihoods(other))
        else:
            np.testing.assert_allclose(likelihoods(one), likelihoods(other), atol=1e-5)
    assert whole.stats().steps < sum(2 * len(answer.token_ids) for answer in alone)


def test_tasks_of_asyncio_are_answered_together(whole: Session) -> None:
    alone = [whole.generate(prompt, max_tokens=15).text for prompt in PROMPTS]
    before = whole.stats()

    async def read(prompt: str) -> str:
        return "".join([piece async for piece in whole.stream(prompt, max_tokens=15)])

    async def read_all() -> list[str]:
        return await asyncio.gather(*map(read, PROMPTS))

    assert asyncio.run(read_all()) == alone
    assert whole.stats().steps - before.steps < 0.8 * before.steps
    assert whole.stats().generated_tokens == 2 * before.generated_tokens


@pytest.fixture
def session(toy: Any, processor: Processor) -> Iterator[Session]:
    with Session(toy, processor, context=200, batch=3) as opened:
        yield opened


def toy_pieces(session: Session, prompt: str) -> range:
    """The pieces that the toy, whose chunk has 8 tokens, reads `prompt` in."""
    return range(0, len(session.encode(prompt).input_ids), session.spec.attention_chunk_size)


def test_a_long_prompt_is_read_between_the_steps_of_those_that_decode(session: Session, toy: Any) -> None:
    gate = Gate(toy)
    first = session.stream("a", max_tokens=60)
    gate.open(len(toy_pieces(session, "a")) + 3)
    next(first)
    second = session.stream(Prompt(np.arange(70) + 3), max_tokens=5)
    gate.open(10_000)
    first.wait(), second.wait()
    pieces = [number for number, (_, count) in enumerate(toy.steps) if count > 1]
    assert sum(toy.steps[number][1] for number in pieces[-9:]) == 70  # the chunk has 8 tokens, so a piece has at most
    between = [toy.steps[number + 1] for number in pieces[-9:-1]]
    assert between == [(1, 1)] * 8
    assert max(rows for rows, _ in toy.steps) == 2


@pytest.fixture
def packing(processor: Processor) -> Iterator[Session]:
    with Session(PackingToy(), processor, context=200, batch=3) as opened:
        yield opened


def test_a_piece_and_a_decode_step_are_one_step_where_rows_are_packed(packing: Session) -> None:
    """The row that is read lies behind one that has ended, so that a row between them has no token."""
    prompts: list[Any] = ["a", "bc", Prompt(np.arange(70) + 3)]
    lengths = [60, 8, 5]
    alone = [packing.generate(prompt, max_tokens=most) for prompt, most in zip(prompts, lengths, strict=True)]
    toy = packing.backend
    toy.steps.clear(), toy.packed.clear()
    gate = Gate(toy)
    streams = [packing.stream(prompt, max_tokens=most) for prompt, most in zip(prompts, lengths, strict=True)]
    gate.open(10_000)
    for stream, expected in zip(streams, alone, strict=True):
        assert (stream.wait().text, stream.wait().token_ids) == (expected.text, expected.token_ids)
    assert sum(counts[-1] for counts in toy.packed if len(counts) == 3) == 70
    assert [1, 1, 8] in toy.packed
    assert [1, 0, 8] in toy.packed
    assert sum(count > 1 for _, count in toy.steps) == len(toy_pieces(packing, "a"))  # before anybody decodes


def test_a_packed_step_that_fails_is_taken_apart(packing: Session) -> None:
    expected = packing.generate("a", max_tokens=60).token_ids
    toy = packing.backend
    forward = toy.forward

    def broken(embeds: Any, positions: Any, *arguments: Any) -> Any:
        if 40 in positions[0] and embeds.shape[1] > 1:
            raise ArrieroError("this piece cannot be read")
        return forward(embeds, positions, *arguments)

    def packed(embeds: Any, counts: Any, cache: Any, index: Any) -> Any:
        if cache.lengths[-1] == 40 and counts[-1] > 1:
            raise ArrieroError("these rows cannot be stepped together")
        return PackingToy.forward_packed(toy, embeds, counts, cache, index)

    toy.forward_packed = packed
    toy.forward = broken
    gate = Gate(toy)
    first, second = packing.stream("a", max_tokens=60), packing.stream(Prompt(np.arange(70) + 3), max_tokens=5)
    gate.open(10_000)
    assert first.wait().token_ids == expected
    with pytest.raises(ArrieroError, match="this piece cannot be read"):
        second.wait()


@pytest.mark.parametrize("when", ["waiting", "reading", "decoding"])
def test_a_request_that_is_cancelled_ends_within_a_step_and_the_others_go_on(
    session: Session, toy: Any, when: str
) -> None:
    expected = session.generate("b", max_tokens=30).text
    gate = Gate(toy)
    others = [session.stream("b", max_tokens=30) for _ in range(3 if when == "waiting" else 1)]
    prompt = Prompt(np.arange(70) + 3) if when == "reading" else Prompt(np.arange(3) + 3)
    cancelled = session.stream(prompt, max_tokens=30)
    gate.open({"waiting": 1, "reading": 8, "decoding": 8}[when])
    if when == "decoding":
        next(cancelled)
    cancelled.close()
    gate.open(10_000)
    answer = cancelled.wait()
    assert answer.finish_reason == "cancelled"
    assert len(answer.token_ids) <= (8 if when == "decoding" else 0)
    assert [other.wait().text for other in others] == [expected] * len(others)


def test_a_stream_that_is_dropped_ends_its_answer(session: Session, toy: Any) -> None:
    gate = Gate(toy)
    stream = session.stream("hello", max_tokens=150)
    gate.open(5)
    next(stream)
    del stream
    gate.open(10_000)
    session.generate("x", max_tokens=3)
    assert session.stats().generated_tokens < 30


def test_a_task_that_is_cancelled_ends_its_answer(session: Session, toy: Any) -> None:
    gate = Gate(toy)

    async def read_rest(stream: arriero.Stream) -> list[str]:
        return [piece async for piece in stream]

    async def leave() -> None:
        stream = session.stream("hello", max_tokens=150)
        gate.open(len(toy_pieces(session, "hello")) + 6)
        await anext(stream)
        waiting = asyncio.ensure_future(read_rest(stream))
        await asyncio.sleep(0.05)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        gate.open(10_000)
        assert len(await read_rest(stream)) < 10
        assert stream.result.finish_reason == "cancelled"

    asyncio.run(leave())


def test_an_error_of_one_row_ends_that_row_alone(session: Session, toy: Any) -> None:
    """Logits that are not finite, a processor of logits that fails, and a step that fails for one of its rows."""
    expected = [session.generate(prompt, max_tokens=20).text for prompt in "ab"]
    unsound, unsteady = "not finite after a few of its tokens", "a step that fails where the others are long over"
    forward, bad = toy.forward, len(session.encode(unsound).input_ids) + 4
    failing = len(session.encode(unsteady).input_ids) + 6

    def broken(embeds: Any, positions: Any, *arguments: Any) -> Any:
        if embeds.shape[1] == 1 and failing in positions:
            raise ArrieroError("this row cannot be stepped")
        out = forward(embeds, positions, *arguments)
        if embeds.shape[1] == 1:
            out.logits[positions[:, 0] == bad] = np.nan
        return out

    toy.forward = broken

    def refuse(ids: Any, logits: Any) -> Any:
        if len(ids) > 30:
            raise RuntimeError("enough")
        return logits

    def processed() -> None:
        session.generate("a processor", max_tokens=100, logits_processor=refuse)

    streams = [session.stream(prompt, max_tokens=20) for prompt in "ab"]
    doomed = session.stream(unsound, max_tokens=20)
    other = session.stream(unsteady, max_tokens=20)
    with pytest.raises(NotFinite):
        doomed.wait()
    with pytest.raises(ArrieroError, match="cannot be stepped"):
        other.wait()
    with pytest.raises(RuntimeError, match="enough"):
        processed()
    assert [stream.wait().text for stream in streams] == expected


def test_an_error_while_a_prompt_is_read_ends_that_request_alone(session: Session, toy: Any) -> None:
    expected = session.generate("a", max_tokens=40).text
    embed = toy.embed

    def broken(ids: Any, features: Any) -> Any:
        if 70 in ids:
            raise ArrieroError("this prompt cannot be read")
        return embed(ids, features)

    toy.embed = broken
    good, bad = session.stream("a", max_tokens=40), session.stream(Prompt(np.arange(40, 80)), max_tokens=5)
    with pytest.raises(ArrieroError, match="cannot be read"):
        bad.wait()
    assert good.wait().text == expected


def test_who_is_told_of_an_end_finds_no_answer_running(
    session: Session, toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the prompt, after a step, by an error while a prompt is read or in a step, and cancelled."""
    counted: list[int] = []

    def put(request: Request, entry: Any) -> None:
        if entry is None or isinstance(entry, BaseException):
            counted.append(session.stats().running)
        told(request, entry)

    told = Request._put
    monkeypatch.setattr(Request, "_put", put)
    session.generate("a", max_tokens=1)
    session.generate("a", max_tokens=5)
    forward = toy.forward

    def broken(failing: int, embeds: Any, *rest: Any) -> Any:
        if embeds.shape[1] == failing:
            raise ArrieroError("no step of so many tokens")
        return forward(embeds, *rest)

    for failing in (8, 1):
        toy.forward = partial(broken, failing)
        with pytest.raises(ArrieroError, match="so many"):
            session.generate(Prompt(np.arange(10) + 3), max_tokens=5)
    toy.forward = forward
    stream = session.stream("a", max_tokens=150)
    next(stream)
    stream.close()
    stream.wait()
    assert counted == [0] * 5


def test_answers_that_outgrow_the_memory_are_paused_and_go_on(
    toy: Any, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest gives its row to the elder ones; its text, draws and log-probabilities are those of a lone run."""
    monkeypatch.setattr(scheduler, "AHEAD", 4)
    picture = np.full((28, 28, 3), 30, np.uint8)
    cases: list[dict[str, Any]] = [
        {"prompt": f"prompt {number}", "temperature": number % 2, "seed": 3, "max_tokens": 50, "logprobs": 2}
        for number in range(4)
    ]
    cases.append({**cases[0], "images": picture})
    with Session(toy, processor, context=200, batch=8) as session:
        alone = [session.generate(**case) for case in cases]
        for prefixes in (0, 1 << 24):
            monkeypatch.setattr(session.backend, "piece", 24)
            session.engine._scheduler = Scheduler(session.spec, EngineLimits(8, 200, 160, prefixes))
            together = [stream.wait() for stream in [session.stream(**case) for case in cases]]
            for one, other in zip(alone, together, strict=True):
                assert one.token_ids == other.token_ids
                np.testing.assert_allclose(likelihoods(one), likelihoods(other), atol=1e-3)
            stats = session.stats()
            assert stats.paused > 0
            assert stats.generated_tokens == 50 * len(cases)
            assert (stats.reused_tokens > 0) == (prefixes > 0)


def test_requests_wait_for_memory_and_none_overtakes(toy: Any, processor: Processor) -> None:
    with Session(toy, processor, context=200, batch=8) as session:
        session.engine._scheduler = Scheduler(session.spec, EngineLimits(8, 200, tokens=150))
        prompt = Prompt(np.arange(10))
        streams = [session.stream(prompt, max_tokens=count) for count in (60, 60, 60, 5)]
        for stream in streams:
            stream.wait()
        assert max(rows for rows, _ in toy.steps) == 2  # 140 tokens; the small one waits behind its elder
        toy.steps.clear()
        session.generate(prompt, max_tokens=190)  # more than all may hold together: alone
        assert {rows for rows, _ in toy.steps} == {1}


def test_a_row_that_ends_leaves_no_gap(toy: Any, processor: Processor, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[int] = []
    move = running_rows.RunningRows._move
    monkeypatch.setattr(running_rows.RunningRows, "_move", lambda *where: (moved.append(1), move(*where)))
    with Session(toy, processor, context=200, batch=4) as session:
        lengths = (5, 40, 12, 30, 20, 9)
        alone = [session.generate(f"prompt {count}", max_tokens=count).token_ids for count in lengths]
        streams = [session.stream(f"prompt {count}", max_tokens=count) for count in lengths]
        assert [stream.wait().token_ids for stream in streams] == alone
    assert moved


def test_an_answer_cannot_be_waited_for_on_the_engines_thread(session: Session) -> None:
    def ask(_: Any, logits: Any) -> Any:
        session.generate("hello", max_tokens=2)
        return logits

    with pytest.raises(ArrieroError, match="waited for on the engine's own thread"):
        session.generate("hello", max_tokens=2, logits_processor=ask)
    assert session.generate("hello", max_tokens=2).token_ids


def test_a_piece_takes_at_most_so_many_steps_time() -> None:
    pace = Pace()
    assert pace.piece() == pace_module.LEAST
    for _ in range(40):
        pace.decoded(0.1)
        pace.read(pace.piece(), 0.01 + 0.001 * pace.piece())
    assert 0.01 + 0.001 * pace.piece() <= pace_module.STEPS_PER_PIECE * 0.1
    assert 0.01 + 0.001 * (pace.piece() + pace_module.GRAIN) > pace_module.STEPS_PER_PIECE * 0.1 - 1e-9
    for _ in range(40):
        pace.read(pace.piece(), 10.0)
    assert pace.piece() == pace_module.LEAST
    for _ in range(40):
        pace.read(pace.piece(), 0.0)
    assert pace.piece() == PREFILL_PIECE
