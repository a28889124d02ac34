"""Prompts that begin like earlier ones: what is reused computes what a fresh reading does, on every backend."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import arriero
from arriero.export.proof.reference import TorchBackend
from arriero.runtimes import prefix_cache
from arriero.runtimes.backend import Backend
from arriero.runtimes.prefix_cache import PrefixCache, Tokens
from arriero.runtimes.processor.processor import Processor, Prompt
from arriero.runtimes.request import Request
from arriero.runtimes.scheduler import EngineLimits
from arriero.runtimes.session import Session
from arriero.runtimes.steps import least_piece, read_piece
from arriero.runtimes.tvm import TvmBackend
from tests.toys import load_reference

MANY = 1 << 30
Open = Callable[[int], Session]


@pytest.fixture(params=["onnxruntime", "tvm", "reference"])
def open_session(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Sessions over one small model with so many bytes for prefixes; blocks are small, so that a chunk has several."""
    monkeypatch.setattr(prefix_cache, "BLOCK", 12)
    workshop = request.getfixturevalue("tvm_workshop" if request.param == "tvm" else "workshop")
    folder, opened = workshop / "bundles" / "fp32", []

    def open_one(prefix_bytes: int) -> Session:
        session = arriero.load(folder, threads=2, prefix_cache=prefix_bytes)
        if request.param == "reference":
            session.close()
            backend: Backend = TorchBackend.of(load_reference(workshop / "scout"))
            processor = Processor(folder / "tokenizer", backend.spec)
            limits = EngineLimits(2, session.context, None, prefix_bytes)
            session = Session(backend, processor, session.context, 2, limits=limits)
        opened.append(session)
        return session

    yield open_one
    for session in opened:
        session.close()


def ids(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 500, count)


def ask(session: Session, prompt: Any, **settings: Any) -> arriero.Generation:
    return session.generate(prompt, max_tokens=6, logprobs=5, **settings)


def check_same(one: arriero.Generation, other: arriero.Generation, bits: bool = False) -> None:
    assert one.logprobs is not None
    assert other.logprobs is not None
    assert one.token_ids == other.token_ids
    chances = [[value for entry in g.logprobs for _, value in entry.top] for g in (one, other)]
    np.testing.assert_allclose(*chances, atol=0 if bits else 1e-5, rtol=0 if bits else 1e-7)


def test_a_prompt_that_begins_like_others_is_answered_as_a_fresh_one(open_session: Open) -> None:
    """Prefixes that end in a chunk's first block, inside it, at its edge and behind it; and the whole prompt again."""
    cached, fresh = open_session(MANY), open_session(0)
    chunk, seen, reused = cached.spec.attention_chunk_size, ids(300), []
    for length in (5, 12, 40, chunk - 1, chunk, chunk + 1, chunk + 30, 2 * chunk + 20, 2 * chunk + 20, 40, chunk + 40):
        before = cached.stats()
        for tail in (ids(0), ids(9, length), ids(70, length)):
            prompt = Prompt(np.concatenate([seen[:length], tail]))
            check_same(ask(cached, prompt), ask(fresh, prompt), isinstance(cached.backend, TvmBackend))
        reused.append(cached.stats().reused_tokens - before.reused_tokens)
    assert fresh.stats().reused_tokens == 0
    assert reused[1] >= 5  # a part of a block
    assert reused[2] >= 12 + 2 * 40
    assert reused[8] >= 3 * (2 * chunk + 20) - 1
    total = cached.stats()
    assert total.reused_tokens + total.prefilled_tokens == fresh.stats().prefilled_tokens


def test_the_next_turn_of_a_conversation_reads_its_own_tokens_alone(open_session: Open) -> None:
    cached, fresh = open_session(MANY), open_session(0)
    history = ids(50)
    for turn in range(8):
        before = cached.stats().prefilled_tokens
        answer = cached.generate(Prompt(history), max_tokens=15)
        assert answer.token_ids == fresh.generate(Prompt(history), max_tokens=15).token_ids
        read = cached.stats().prefilled_tokens - before
        assert read == (50 if turn == 0 else 11 + 1)  # the answer's last token was chosen, not read
        history = np.concatenate([history, answer.token_ids, ids(11, turn)])
    assert len(history) > 2 * cached.spec.attention_chunk_size


def test_pictures_are_part_of_a_prefix_and_are_seen_once(open_session: Open) -> None:
    cached, fresh = open_session(MANY), open_session(0)
    if cached.spec.vision is None:
        pytest.fail("the small model sees")
    pictures = [np.full((40, 60, 3), shade, np.uint8) for shade in (20, 200)]
    calls: list[int] = []
    vision = cached.backend.vision
    cached.backend.vision = lambda tiles: (calls.append(len(tiles)), vision(tiles))[1]  # type: ignore[method-assign]
    for images in ([pictures[0]], [pictures[1]], pictures, pictures[::-1], [pictures[0]], pictures):
        check_same(ask(cached, "Compare", images=images), ask(fresh, "Compare", images=images))
    prompt = cached.encode("Compare", pictures)
    longer = Prompt(np.concatenate([prompt.input_ids, ids(7)]), prompt.pixel_values)
    before = cached.stats()
    check_same(ask(cached, longer), ask(fresh, longer))
    shared = min(len(prompt.input_ids), len(longer.input_ids) - least_piece(cached.backend))
    assert cached.stats().reused_tokens - before.reused_tokens == shared
    assert calls == [1] * len({tile.tobytes() for tile in cached.encode("Compare", pictures).pixel_values})


# --- the cache itself, over the toy, whose chunk has 8 tokens


@pytest.fixture
def toy_session(toy: Any, processor: Processor, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Session]:
    monkeypatch.setattr(prefix_cache, "BLOCK", 4)

    def make(most: int) -> Session:
        return Session(toy, processor, 200, 3, ("one",), limits=EngineLimits(3, 200, None, most))

    return make


def prefixes(session: Session) -> PrefixCache:
    cache = session.engine._scheduler._prefixes
    assert cache is not None
    return cache


def test_an_adapter_shares_nothing_with_another(toy_session: Callable[[int], Session]) -> None:
    session = toy_session(MANY)
    prompt = Prompt(ids(20) % 256)
    session.generate(prompt, max_tokens=2)
    session.generate(prompt, max_tokens=2, adapter="one")
    assert session.stats().reused_tokens == 0
    session.generate(prompt, max_tokens=2, adapter="one")
    assert session.stats().reused_tokens == 19  # the last token's logits are asked for


def test_bytes_are_bounded_and_the_newest_stay(toy_session: Callable[[int], Session]) -> None:
    probe = toy_session(MANY)
    probe.generate(Prompt(ids(20) % 256), max_tokens=2)
    one = prefixes(probe).nbytes
    session = toy_session(2 * one + one // 2)
    prompts = [Prompt(ids(20, seed) % 256) for seed in range(6)]
    for prompt in prompts:
        session.generate(prompt, max_tokens=2)
        cache = prefixes(session)
        assert cache.nbytes == sum(entry.nbytes for entry in cache._entries.values()) <= cache.most_bytes
    for seed, reused in ((5, True), (4, True), (0, False)):
        before = session.stats().reused_tokens
        session.generate(prompts[seed], max_tokens=1)
        assert (session.stats().reused_tokens > before) == reused
    assert set(prefixes(session)._short) <= {b"0", *prefixes(session)._entries}


def test_short_prompts_of_one_length_go_one_by_one(toy_session: Callable[[int], Session]) -> None:
    """As of many conversations that have just begun: one that goes takes no other with it, and none goes twice."""
    probe = toy_session(MANY)
    probe.generate(Prompt(ids(3) % 256), max_tokens=1)
    one = prefixes(probe).nbytes  # a third of it for each token
    session = toy_session(4 * one)
    prompts = [Prompt(ids(3, seed) % 256) for seed in range(4)]
    for prompt in (*prompts, Prompt(ids(4, 4) % 256)):  # the last takes the places of two
        session.generate(prompt, max_tokens=1)
    for seed, reused in ((3, 2), (2, 2), (0, 0)):
        before = session.stats().reused_tokens
        session.generate(prompts[seed], max_tokens=1)
        assert session.stats().reused_tokens == before + reused
    session.generate(Prompt(ids(12, 5) % 256), max_tokens=1)  # and of all


def test_what_is_known_of_short_blocks_is_what_is_there(toy_session: Callable[[int], Session]) -> None:
    session, draw = toy_session(3000), np.random.default_rng(1)
    for _ in range(300):
        prompt = np.concatenate([ids(8, draw.integers(3)), ids(8, draw.integers(3))])[: draw.integers(1, 16)] % 256
        session.generate(Prompt(prompt), max_tokens=int(draw.integers(1, 5)))
        cache, there = prefixes(session), dict[bytes, Counter[int]]()
        assert cache.nbytes == sum(entry.nbytes for entry in cache._entries.values()) <= cache.most_bytes
        for block in cache._entries.values():
            if block.is_short(cache._end(block.start)):
                there.setdefault(block.before, Counter())[block.stop - block.start] += 1
        assert cache._short == there
    assert session.stats().reused_tokens > 100


def test_a_prefix_larger_than_all_bytes_keeps_its_beginning(toy_session: Callable[[int], Session]) -> None:
    probe = toy_session(MANY)
    probe.generate(Prompt(ids(16) % 256), max_tokens=2)
    session = toy_session(prefixes(probe).nbytes)
    long = Prompt(np.concatenate([ids(16), ids(60, 1)]) % 256)
    session.generate(long, max_tokens=2)
    assert 0 < prefixes(session).nbytes <= prefixes(session).most_bytes
    session.generate(long, max_tokens=2)
    assert session.stats().reused_tokens >= 8


@pytest.mark.parametrize("length", [7, 12, 16, 21, 27])
@pytest.mark.parametrize("piece", [1, 3, 5, 9])
def test_a_prompt_is_kept_while_it_is_read_as_it_would_be_at_once(
    toy_session: Callable[[int], Session], toy: Any, monkeypatch: pytest.MonkeyPatch, length: int, piece: int
) -> None:
    prompt, kept = Prompt(ids(length) % 256), []
    for pieces in (toy.piece, piece):
        monkeypatch.setattr(toy, "piece", pieces)
        session = toy_session(MANY)
        copied: list[int] = []
        snapshot = type(toy.new_cache(1, 8)).snapshot

        def counted(cache: Any, row: int, start: int = 0, take: Any = snapshot, log: list[int] = copied) -> Any:
            log.append(int(cache.lengths[row]) - start)
            return take(cache, row, start)

        with monkeypatch.context() as patch:
            patch.setattr(type(toy.new_cache(1, 8)), "snapshot", counted)
            session.generate(prompt, max_tokens=1)
        assert max(copied) <= (pieces + prefix_cache.BLOCK if pieces == piece else length)
        kept.append(prefixes(session)._entries)
    assert [*kept[0]] == [*kept[1]]
    for one, other in zip(*(entries.values() for entries in kept), strict=True):
        assert (one.before, one.start, one.stop, one.has_chunked) == (
            other.before,
            other.start,
            other.stop,
            other.has_chunked,
        )
        for mine, whole in zip((*one.keys, *one.values), (*other.keys, *other.values), strict=True):
            np.testing.assert_allclose(mine, whole, atol=1e-5)  # float32, summed in another order


def test_the_first_token_is_handed_over_before_what_was_read_is_kept(
    toy_session: Callable[[int], Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    save, deliver = PrefixCache.save, Request.deliver
    monkeypatch.setattr(PrefixCache, "save", lambda self, *rest: (order.append("kept"), save(self, *rest))[1])
    monkeypatch.setattr(Request, "deliver", lambda self, delta: (order.append("told"), deliver(self, delta))[1])
    session = toy_session(MANY)
    session.generate(Prompt(ids(12) % 256), max_tokens=3)
    assert order == ["told", "kept", "told", "kept", "told"]  # the answer's end is told with what others go on from
    order.clear()
    session.generate(Prompt(ids(12, 1) % 256), max_tokens=1)
    assert order == ["kept", "told"]


def test_a_prompt_too_long_to_be_kept_is_not_copied_again_with_each_piece(
    toy_session: Callable[[int], Session], toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = toy_session(MANY)
    probe.generate(Prompt(ids(16) % 256), max_tokens=1)
    monkeypatch.setattr(toy, "piece", 4)
    session, saved = toy_session(prefixes(probe).nbytes), []
    block = PrefixCache._block
    monkeypatch.setattr(PrefixCache, "_block", lambda self, *rest: (saved.append(rest), block(self, *rest))[1])
    session.generate(Prompt(np.concatenate([ids(16), ids(60, 1)]) % 256), max_tokens=1)
    assert len(saved) <= 76 // prefix_cache.BLOCK + 1


def read_row(toy: Any, tokens: np.ndarray) -> Any:
    """A cache of one row that holds `tokens`."""
    row, nothing = toy.new_cache(1, 64), np.zeros((0, toy.spec.hidden_size), np.float32)
    for at in range(0, len(tokens), toy.piece):
        piece = tokens[at : at + toy.piece]
        read_piece(toy, piece, nothing, row, np.array([len(piece) - 1]))
    return row


def test_steps_are_taken_between_the_blocks_that_are_saved(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_cache, "BLOCK", 4)
    tokens = Tokens(ids(23) % 256, np.zeros(0, np.int64), (), 1, 0)
    row, there = read_row(toy, tokens.ids), list[int]()
    whole, left = PrefixCache(toy.spec, MANY), PrefixCache(toy.spec, MANY)
    whole.save(tokens, row)
    left.save(tokens, row, lambda: there.append(len(left._entries)))
    assert there == [*range(6)]
    assert [*left._entries] == [*whole._entries]


def test_nothing_is_saved_behind_a_block_that_went_meanwhile(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_cache, "BLOCK", 4)
    tokens, other = (Tokens(ids(23, seed) % 256, np.zeros(0, np.int64), (), 1, 0) for seed in (0, 1))
    rows = {of: read_row(toy, of.ids) for of in (tokens, other)}
    probe = PrefixCache(toy.spec, MANY)
    probe.save(tokens, rows[tokens])
    cache, left = PrefixCache(toy.spec, probe.nbytes), list[int]()

    def save_another() -> None:
        left.append(1)
        if len(left) == 4:
            cache.save(other, rows[other])

    cache.save(tokens, rows[tokens], save_another)
    assert len(left) == 4
    blocks = {name: block for name, block in cache._entries.items() if isinstance(block, prefix_cache._Block)}
    assert {block.before for block in blocks.values()} <= {tokens.root, *blocks}
    assert cache.find(other) is not None


def test_a_hash_covers_every_token_before(toy_session: Callable[[int], Session]) -> None:
    session = toy_session(MANY)
    first, second = ids(24) % 256, ids(24) % 256
    second[1] += 1
    session.generate(Prompt(first), max_tokens=2)
    session.generate(Prompt(second), max_tokens=2)
    assert session.stats().reused_tokens == 0
