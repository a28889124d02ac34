"""Pieces of a prompt that are read in parts, with decode steps of others between them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arriero.errors import ArrieroError
from arriero.runtimes import pace as pace_module
from arriero.runtimes.backend import GIVE_UP, StepGivenUp
from arriero.runtimes.integrity import open_manifest
from arriero.runtimes.interlude import LOOK_S, Interlude
from arriero.runtimes.pace import STEPS_PER_PIECE, Pace
from arriero.runtimes.processor.processor import Processor, Prompt
from arriero.runtimes.scheduler import EngineLimits, Scheduler
from arriero.runtimes.session import Session
from arriero.runtimes.steps import append_tokens, look_preempted, read_piece, read_preempted
from arriero.runtimes.tvm import TvmBackend
from tests.runtimes.conftest import TOY_PRODUCTS, PreemptibleToy
from tests.runtimes.gate import Gate

TOWER_LAYERS = 2  # of the workshop's checkpoint, each with products for q, k, v, the output and two of its MLP
TOWER_OTHERS = 4  # patches, two of the adapter, and the projector
LONG = Prompt(np.arange(70) + 3)  # eight pieces, for the toy's chunk has 8 tokens, and a rest


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows take a decode step whenever they may, and the rest of a prompt goes with one where it is short.

    What gates and a busy machine add to the times of steps says nothing then.
    """
    monkeypatch.setattr(Pace, "is_due", lambda *_: True)
    monkeypatch.setattr(Pace, "piece", lambda _: pace_module.LEAST)


@pytest.fixture
def session(processor: Processor, steady: None) -> Iterator[Session]:
    """A session of the toy."""
    with Session(PreemptibleToy(), processor, context=200, batch=3) as opened:
        yield opened


def start(session: Session, most: int) -> tuple[Any, Any]:
    """A stream that decodes, and one whose prompt is read then."""
    gate = Gate(session.backend)
    first = session.stream("a", max_tokens=most)
    pieces = range(0, len(session.encode("a").input_ids), session.spec.attention_chunk_size)
    gate.open(len(pieces) + 3)
    next(first)
    second = session.stream(LONG, max_tokens=5)
    gate.open(10_000)
    return first, second


def test_others_decode_between_the_layers_of_a_long_prompt(session: Session) -> None:
    toy = session.backend
    alone = [session.generate("a", max_tokens=60), session.generate(LONG, max_tokens=5)]
    toy.steps.clear()
    for stream, expected in zip(start(session, 60), alone, strict=True):
        assert (stream.wait().text, stream.wait().token_ids) == (expected.text, expected.token_ids)
    pieces = [number for number, (_, count) in enumerate(toy.steps) if count > 1][-8:]
    assert [toy.steps[number] for number in pieces] == [(1, 8)] * 8
    for one, following in pairwise(pieces):
        assert toy.steps[one + 1 : following] == [(1, 1)] * 3  # after a piece, and before each layer of the next
    assert [1, 6] in toy.packed or [1, 0, 6] in toy.packed  # the rest, with the others' step: it is small


def test_pieces_that_are_left_are_as_large_as_alone(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pace, "piece", lambda _: 3)  # what may be read between two decode steps
    toy = session.backend
    toy.steps.clear()
    for stream in start(session, 60):
        stream.wait()
    assert [step for step in toy.steps if step[1] > 1][-9:] == [*[(1, 8)] * 8, (1, 6)]


def test_a_row_whose_decode_step_fails_between_layers_ends_alone(session: Session) -> None:
    expected, forward, toy = session.generate(LONG, max_tokens=5).token_ids, session.backend.forward, session.backend
    failing = len(session.encode("a").input_ids) + 8

    def broken(embeds: Any, positions: Any, *arguments: Any) -> Any:
        if positions.shape[1] == 1 and positions[0, 0] == failing:
            raise ArrieroError("this row cannot be stepped")
        return forward(embeds, positions, *arguments)

    toy.forward = broken
    first, second = start(session, 60)
    assert second.wait().token_ids == expected
    with pytest.raises(ArrieroError, match="cannot be stepped"):
        first.wait()


def test_an_error_of_no_row_ends_all_and_later_requests_are_answered(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = session.generate("a", max_tokens=5).token_ids
    calls = []

    def broken(self: Scheduler, _: Any) -> bool:
        if not self._rows.decoding:
            return False  # the first is read alone
        calls.append(1)
        raise RuntimeError("of nobody")

    monkeypatch.setattr(Scheduler, "_decode_between", broken)
    for stream in start(session, 60):
        with pytest.raises(RuntimeError, match="of nobody"):
            stream.wait()
    assert len(calls) == 1  # nothing else is tried between the layers that were left
    assert session.generate("a", max_tokens=5).token_ids == expected


def test_who_leaves_meanwhile_is_ended_between_layers(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, streams, seen = session.generate(LONG, max_tokens=5).token_ids, list[Any](), list[int]()

    def leave(*_: Any) -> bool:
        seen.append(session.stats().generated_tokens)
        if len(seen) == 4:
            streams[0].close()
        return True

    monkeypatch.setattr(Pace, "is_due", leave)
    gate = Gate(session.backend)
    streams.append(session.stream("a", max_tokens=150))
    gate.open(8)
    next(streams[0])
    second = session.stream(LONG, max_tokens=5)
    gate.open(10_000)
    assert streams[0].wait().finish_reason == "cancelled"
    assert second.wait().token_ids == expected
    assert len(streams[0].wait().token_ids) == seen[3] - len(expected)  # none came after it left


@pytest.mark.parametrize("decoding", [True, False])
def test_a_prompt_that_nobody_wants_is_given_up_between_layers(session: Session, decoding: bool) -> None:
    toy, seen = session.backend, list[int]()
    expected = session.generate("a", max_tokens=30).token_ids
    read_preempted = toy.forward_preempted

    def left(embeds: Any, positions: Any, cache: Any, index: Any, between: Any) -> Any:
        def counted() -> float | None:
            if int(positions[0, 0]) >= 16:  # of the long one, in the first layer of its third piece
                seen.append(len(toy.steps))
                streams[-1].close()
            return between()

        return read_preempted(embeds, positions, cache, index, counted)

    gate, streams = Gate(toy), list[Any]()
    if decoding:
        streams.append(session.stream("a", max_tokens=30))
        gate.open(8)
        next(streams[0])
    toy.forward_preempted = left
    streams.append(session.stream(LONG, max_tokens=5))
    gate.open(10_000)
    assert streams[-1].wait().finish_reason == "cancelled"
    assert len(seen) == 1  # no second layer was begun
    if decoding:
        assert streams[0].wait().token_ids == expected
    toy.forward_preempted = read_preempted
    assert session.generate("a", max_tokens=30).token_ids == expected


def test_a_tile_that_nobody_wants_is_given_up_between_products(session: Session) -> None:
    interludes, preempted = list[int](), session.backend.vision_preempted

    def left(tile: Any, between: Any) -> Any:
        def counted() -> float | None:
            interludes.append(1)
            stream.close()
            return between()

        return preempted(tile, counted)

    gate = Gate(session.backend)
    session.backend.vision_preempted = left
    image = np.random.default_rng(1).integers(0, 255, (8, 8, 3), np.uint8)
    stream = session.stream("b", image, max_tokens=5)
    gate.open(10_000)
    assert stream.wait().finish_reason == "cancelled"
    assert len(interludes) == 1


def test_no_step_between_layers_takes_what_is_not_there(
    processor: Processor, steady: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers pause between pieces where tokens run out, not within one."""
    toy = PreemptibleToy()
    with Session(toy, processor, context=200, batch=3) as session:
        alone = [session.generate("a", max_tokens=60).token_ids, session.generate(LONG, max_tokens=5).token_ids]
        held = len(session.encode("a").input_ids) + 12 + len(LONG.input_ids)
        session.engine._scheduler = scheduler = Scheduler(session.spec, EngineLimits(3, 200, held))
        monkeypatch.setattr("arriero.runtimes.scheduler.AHEAD", 1)
        between = Scheduler._decode_between

        def counted(self: Scheduler, backend: Any) -> None:
            between(self, backend)
            running = [*self._rows.decoding, *([self._reading] if self._reading else [])]
            assert sum(request.length for request in running) <= held

        monkeypatch.setattr(Scheduler, "_decode_between", counted)
        assert [stream.wait().token_ids for stream in start(session, 60)] == alone
        assert scheduler.stats.paused > 0


def test_tvm_leaves_a_step_between_its_parts_and_computes_the_same_bits(tvm_workshop: Path) -> None:
    folder = tvm_workshop / "bundles" / "int8"
    backend = TvmBackend(folder, open_manifest(folder).model, threads=2)
    assert backend.preemptible
    draw = np.random.default_rng(1)
    prompts = [draw.integers(0, 500, count) for count in (21, 5, 9)]
    none, last = np.zeros((0, backend.spec.hidden_size), np.float32), np.array([0, 11, 20])

    def read(cache: Any, row: int, index: Any) -> np.ndarray:
        return read_piece(backend, prompts[row], none, cache.rows(row, row + 1), index).logits[0]

    cache = backend.new_cache(3, 64)
    alone = read(cache, 0, last)
    for row in (1, 2):
        read(cache, row, np.array([0]))
    left: list[int] = []
    read_preempted(backend, prompts[0], none, backend.new_cache(1, 64), last, lambda: left.append(1))
    parts = len(left)
    left.clear()
    read_preempted(backend, prompts[0], none, backend.new_cache(1, 64), last, lambda: left.append(1) or 1e9)
    assert len(left) == 1  # nobody is due meanwhile; the next step asks anew
    assert parts > sum(2 if layer.ffn == "moe" else 1 for layer in backend.spec.layers)
    decoded = [append_tokens(backend, [7 + step, 11], cache.rows(1, 3)) for step in range(parts)]
    following = append_tokens(backend, [3], cache.rows(0, 1))

    cache, steps = backend.new_cache(3, 64), list[np.ndarray]()
    for row in (1, 2):
        read(cache, row, np.array([0]))

    def between() -> None:
        steps.append(append_tokens(backend, [7 + len(steps), 11], cache.rows(1, 3)))

    logits = read_preempted(backend, prompts[0], none, cache.rows(0, 1), last, between)
    assert len(steps) == parts
    assert np.array_equal(logits, alone)
    assert all(map(np.array_equal, steps, decoded))
    assert np.array_equal(append_tokens(backend, [3], cache.rows(0, 1)), following)
    assert cache.lengths.tolist() == [22, 5 + len(steps), 9 + len(steps)]
    assert len(steps) == parts  # an ordinary step is not left


@pytest.mark.parametrize("after", [1, 7])
def test_tvm_gives_a_step_up_and_goes_on_with_the_next(tvm_workshop: Path, after: int) -> None:
    folder = tvm_workshop / "bundles" / "int8"
    backend = TvmBackend(folder, open_manifest(folder).model, threads=2)
    none, last, calls = np.zeros((0, backend.spec.hidden_size), np.float32), np.array([20]), list[np.ndarray]()
    ids, cache = np.random.default_rng(1).integers(0, 500, 21), backend.new_cache(2, 64)
    read_piece(backend, ids[:5], none, cache.rows(1, 2), np.array([4]))
    alone = read_piece(backend, ids, none, cache.rows(0, 1), last).logits[0]
    cache.truncate(0, 0)

    def between() -> float:
        calls.append(append_tokens(backend, [len(calls)], cache.rows(1, 2)))
        return GIVE_UP if len(calls) == after else 0.0

    with pytest.raises(StepGivenUp):
        read_preempted(backend, ids, none, cache.rows(0, 1), last, between)
    assert len(calls) == after  # nothing was begun after it
    assert cache.lengths.tolist() == [0, 5 + after]
    assert np.array_equal(read_preempted(backend, ids, none, cache.rows(0, 1), last, lambda: 0.0), alone)
    cache.truncate(1, 5)
    for number, call in enumerate(calls):
        assert np.array_equal(append_tokens(backend, [number], cache.rows(1, 2)), call)
    if backend.spec.vision is not None:
        tile = np.zeros((1, 3, backend.spec.vision.image_size, backend.spec.vision.image_size), np.float32)
        with pytest.raises(StepGivenUp):
            look_preempted(backend, tile, lambda: GIVE_UP)
        assert np.array_equal(look_preempted(backend, tile, lambda: 0.0), backend.vision(tile))


def test_others_decode_while_the_tower_sees_a_tile(session: Session) -> None:
    toy = session.backend
    images = [np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8) for seed in (1, 2)]
    alone = [session.generate("a", max_tokens=60), session.generate("b", images, max_tokens=5)]
    gate = Gate(toy)
    first = session.stream("a", max_tokens=60)
    gate.open(8)
    next(first)
    toy.looks.clear()
    toy.steps.clear()
    images = [image + 1 for image in images]  # which nobody has shown before
    expected_tiles = session.encode("b", images).pixel_values
    second = session.stream("b", images, max_tokens=5)
    gate.open(10_000)
    assert first.wait().token_ids == alone[0].token_ids
    second.wait()
    assert len(toy.looks) == len(expected_tiles) > 1
    assert all(steps == TOY_PRODUCTS for steps in toy.looks)  # a step of the other before each product


def test_an_error_of_a_decode_step_within_a_tile_is_not_the_tiles(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = np.random.default_rng(3).integers(0, 255, (8, 8, 3), np.uint8)
    expected = session.generate("b", image, max_tokens=5).token_ids

    def broken(*_: Any) -> None:
        raise RuntimeError("of nobody")

    gate = Gate(session.backend)
    first = session.stream("a", max_tokens=60)
    gate.open(8)
    next(first)
    with monkeypatch.context() as patch:
        patch.setattr(Scheduler, "_decode_between", broken)
        second = session.stream("b", image + 1, max_tokens=5)
        gate.open(10_000)
        for stream in (first, second):
            with pytest.raises(RuntimeError, match="of nobody"):
                stream.wait()
    assert session.generate("b", image, max_tokens=5).token_ids == expected


def test_tvm_leaves_a_tile_between_its_parts_and_computes_the_same_bits(tvm_workshop: Path) -> None:
    folder = tvm_workshop / "bundles" / "int8"
    backend = TvmBackend(folder, open_manifest(folder).model, threads=2)
    spec = backend.spec
    assert spec.vision is not None
    draw = np.random.default_rng(5)
    tile = draw.normal(size=(1, 3, spec.vision.image_size, spec.vision.image_size)).astype(np.float32)
    none, cache = np.zeros((0, spec.hidden_size), np.float32), backend.new_cache(1, 400)
    ids = draw.integers(0, 500, 5)

    def begin() -> None:
        cache.truncate(0, 0)
        read_piece(backend, ids, none, cache, np.array([4]))

    alone = backend.vision(tile)
    begin()
    calls: list[np.ndarray] = []
    features = look_preempted(backend, tile, lambda: calls.append(append_tokens(backend, [len(calls)], cache)))
    assert np.array_equal(features, alone)
    assert len(calls) == 6 * TOWER_LAYERS + TOWER_OTHERS
    begin()
    assert all(np.array_equal(append_tokens(backend, [number], cache), call) for number, call in enumerate(calls))
    before = len(calls)
    assert np.array_equal(backend.vision(tile), alone)
    assert len(calls) == before  # an ordinary tile is not left


def test_tvm_leaves_no_step_where_another_would_move_the_cache(
    tvm_workshop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tvm_workshop / "bundles" / "int8"
    backend = TvmBackend(folder, open_manifest(folder).model, threads=1)
    cache = backend.new_cache(2, 64)
    monkeypatch.setattr(cache.store, "has_all_slots", False)
    none = np.zeros((0, backend.spec.hidden_size), np.float32)
    calls = []
    ids = np.arange(9) + 5
    logits = read_preempted(backend, ids, none, cache.rows(0, 1), np.array([8]), lambda: calls.append(1))
    assert not calls
    assert np.array_equal(logits, read_piece(backend, ids, none, cache.rows(1, 2), np.array([8])).logits[0])


def test_a_step_is_left_only_when_those_that_decode_have_waited() -> None:
    pace = Pace()
    assert pace.is_due(0.0)  # nothing is known
    pace.decoded(1000.0)
    assert not pace.is_due(1000.0 * STEPS_PER_PIECE - 50)
    assert pace.is_due(1000.0 * STEPS_PER_PIECE + 1)
    assert 0 < 1000.0 * STEPS_PER_PIECE - pace.rest() < 50  # since it ended


def test_who_reads_alone_is_looked_at_now_and_then_and_asked_for_steps_once() -> None:
    asked = list[int]()
    unwanted = [False, False, True]
    interlude = Interlude(Pace(), lambda: bool(asked.append(1)), lambda: unwanted.pop(0))
    assert [interlude() for _ in range(3)] == [LOOK_S, LOOK_S, GIVE_UP]
    assert len(asked) == 1


def test_nobody_waits_who_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("arriero.runtimes.pace.time.perf_counter", lambda: now[0])
    pace = Pace()
    pace.decoded(1.0)
    now[0] = 5.0
    assert pace.is_due(0.0)
    assert pace.rest() == 0


def test_a_part_is_expected_to_take_as_long_as_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now, asked, taken = [0.0], [], []
    monkeypatch.setattr("arriero.runtimes.interlude.time.perf_counter", lambda: now[0])

    def is_due(self: Pace, seconds: float) -> bool:
        asked.append(seconds)
        return len(asked) == 2

    def decode() -> bool:
        now[0] += 100
        taken.append(len(asked))
        return True

    monkeypatch.setattr(Pace, "is_due", is_due)
    interlude = Interlude(Pace(), decode, lambda: False)
    for seconds in (1, 5, 3, 7):
        now[0] += seconds
        interlude()
    interlude.check()
    assert asked == [0.5, 2.5, 1.5, 3.5]  # half of it, and nothing of the hundred that the decode step took
    assert taken == [2]  # one step, where it was due
