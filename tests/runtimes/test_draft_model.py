"""A draft model changes how soon an answer comes and nothing else, whether it is the same model or the contrary one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import arriero
from arriero.errors import ArrieroError
from arriero.export.proof.reference import TorchBackend
from arriero.runtimes import api
from arriero.runtimes.api import open_bundle_backend
from arriero.runtimes.backend import BackendOptions
from arriero.runtimes.bundle_memory import session_bytes, token_bytes
from arriero.runtimes.draft_model import SHORT, DraftModel
from arriero.runtimes.integrity import open_manifest
from arriero.runtimes.pace import Pace
from arriero.runtimes.processor.processor import Processor
from arriero.runtimes.scheduler import EngineLimits
from arriero.runtimes.session import Session
from arriero.runtimes.snapshot import check_truncation
from tests.command import arriero as run_command
from tests.runtimes.conftest import PackingToy, ToyBackend, ToyCache
from tests.runtimes.gate import Gate
from tests.runtimes.test_speculation import MOST, PROMPTS
from tests.toys import load_reference


@pytest.fixture
def drafted(request: pytest.FixtureRequest, kind: str) -> Iterator[Callable[[bool], Session]]:
    """Open sessions like `whole` whose drafts come from the same model, or from another one of the same tokens."""
    opened: list[Session] = []

    def start(same: bool) -> Session:
        workshop = request.getfixturevalue("tvm_workshop" if kind == "tvm" else "workshop")
        bundle = workshop / "bundles" / "fp32"
        limits = EngineLimits(4, 400, speculate=MOST)
        if kind == "reference":
            backend, draft = (TorchBackend.of(load_reference(workshop / "scout")) for _ in range(2))
        else:
            manifest = open_manifest(bundle)
            backend, draft = (open_bundle_backend(manifest, BackendOptions(2)) for _ in range(2))
        session = Session(
            backend, Processor(bundle / "tokenizer", backend.spec), 400, 4, limits=limits,
            draft=draft if same else Contrary(draft),
        )  # fmt: skip
        opened.append(session)
        return session

    yield start
    for session in opened:
        session.close()


class Contrary:
    """A backend that likes least what the one behind it likes most."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        output = self._backend.forward(*arguments, **named)
        output.logits[...] *= -1
        return output

    def forward_packed(self, *arguments: Any) -> Any:
        output = self._backend.forward_packed(*arguments)
        output.logits[...] *= -1
        return output


@pytest.mark.parametrize("same", [True, False])
def test_answers_are_those_without_a_draft_model(
    whole: Session, drafted: Callable[[bool], Session], same: bool
) -> None:
    """Alone and together, greedy and drawn, over chunks' edges, in a conversation; a prompt may be long."""
    cases: list[dict[str, Any]] = [
        {"prompt": text, "max_tokens": 20 + 7 * number, "temperature": number % 2 * 0.8, "seed": 3}
        for number, text in enumerate(PROMPTS)
    ]
    plain = [whole.generate(**case) for case in cases]
    steps = whole.stats().steps
    session = drafted(same)
    alone = [session.generate(**case) for case in cases]
    stats = session.stats()
    assert stats.failed_drafts == 0
    assert stats.drafted_tokens > 0
    if same:
        assert stats.steps < 0.8 * steps
        assert stats.accepted_tokens > 0.5 * stats.drafted_tokens
    else:
        assert stats.accepted_tokens < 0.1 * stats.drafted_tokens
    with ThreadPoolExecutor(len(cases)) as pool:
        together = list(pool.map(lambda case: session.generate(**case), cases))
    for found in (alone, together):
        assert [(one.token_ids, one.finish_reason) for one in found] == [
            (one.token_ids, one.finish_reason) for one in plain
        ]
    talks = [[chat.send(text, max_tokens=12).token_ids for text in ("hello", "and then?")]
             for chat in (whole.chat(), session.chat())]  # fmt: skip
    assert talks[0] == talks[1]
    assert session.stats().failed_drafts == 0


TOYS = [(ToyBackend, ToyBackend), (PackingToy, ToyBackend), (PackingToy, PackingToy)]


@pytest.fixture(params=TOYS, ids=str)
def drafting(request: pytest.FixtureRequest, processor: Processor) -> Iterator[Session]:
    """A session over the toy whose draft is the toy again."""
    target, draft = request.param
    limits = EngineLimits(3, 200, speculate=MOST)
    with Session(target(), processor, context=200, batch=3, limits=limits, draft=draft()) as opened:
        yield opened


def draft_of(session: Session) -> Any:
    assert session.engine._draft is not None
    return session.engine._draft.backend


def test_all_that_the_same_model_drafts_is_right(drafting: Session, toy_session: Session) -> None:
    """Over many chunks' edges, and whichever rows end in the meantime; nothing of a row is left in the next."""
    lengths = {"a": 120, "bc": 24, "a longer one, of several chunks": 50, "d": 9, "e": 30}
    plain = {prompt: toy_session.generate(prompt, max_tokens=most) for prompt, most in lengths.items()}
    gate = Gate(drafting.backend)
    streams = {prompt: drafting.stream(prompt, max_tokens=most) for prompt, most in lengths.items()}
    gate.open(10_000)
    for prompt, stream in streams.items():
        assert stream.wait().token_ids == plain[prompt].token_ids
    stats = drafting.stats()
    assert stats.accepted_tokens == stats.drafted_tokens > 20
    assert stats.failed_drafts == 0
    assert drafting.engine._draft is not None
    assert drafting.engine._draft._cache is None  # given back with the last answer


class CheckedCache(ToyCache):
    """A cache that is cut back no further than one of attention chunks of four tokens."""

    chunk = replace(ToyBackend().spec, attention_chunk_size=4)

    def rows(self, start: int, stop: int) -> CheckedCache:
        return CheckedCache(self.store[start:stop], self.lengths[start:stop], self.adapters[start:stop], self.capacity)

    def truncate(self, row: int, length: int) -> None:
        check_truncation(self.chunk, int(self.lengths[row]), length)
        super().truncate(row, length)


@pytest.mark.parametrize("every", [2, 3, 5])
def test_what_follows_a_wrong_draft_is_right_again(
    processor: Processor, toy_session: Session, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    """The draft's cache is cut back to what was chosen, which its own attention chunks allow."""
    draft, toy_cache = ToyBackend(), ToyBackend().new_cache
    draft.spec = CheckedCache.chunk
    draft.new_cache = lambda batch, capacity: CheckedCache(*vars(toy_cache(batch, capacity)).values())  # type: ignore[method-assign]
    likeliest, guess = DraftModel._likeliest, DraftModel._guess
    number, said, right = count(1), list[bool](), list[int]()

    def spoilt(model: DraftModel, logits: np.ndarray) -> int:
        said.append(next(number) % every != 0)
        return likeliest(model, logits) ^ (not said[-1])

    def counted(model: DraftModel, *arguments: Any) -> dict[int, list[int]]:
        said.clear()
        guessed = guess(model, *arguments)
        right.append([*said, False].index(False) if guessed else 0)
        return guessed

    monkeypatch.setattr(DraftModel, "_likeliest", spoilt)
    monkeypatch.setattr(DraftModel, "_guess", counted)
    limits = EngineLimits(3, 200, speculate=MOST)
    with Session(ToyBackend(), processor, context=200, batch=3, limits=limits, draft=draft) as session:
        answer = session.generate("a", max_tokens=120)
        stats = session.stats()
    assert answer.token_ids == toy_session.generate("a", max_tokens=120).token_ids
    assert stats.failed_drafts == 0
    assert 0 < stats.accepted_tokens == sum(right) < stats.drafted_tokens


def test_a_cancelled_answer_leaves_the_drafts_of_others_as_they_are(drafting: Session, toy_session: Session) -> None:
    plain = toy_session.generate("other", max_tokens=60)
    gate = Gate(drafting.backend)
    first, second = drafting.stream("a", max_tokens=100), drafting.stream("other", max_tokens=60)
    gate.open(12)
    first.next_delta()
    first.close()
    gate.open(10_000)
    assert second.wait().token_ids == plain.token_ids
    stats = drafting.stats()
    assert stats.accepted_tokens == stats.drafted_tokens > 0


@pytest.mark.parametrize("after", [0, 1, 7])
def test_an_answer_goes_on_without_a_draft_that_fails(drafting: Session, toy_session: Session, after: int) -> None:
    """At its first step or later; it is tried again, less and less often."""
    draft, calls = draft_of(drafting), [0]
    expected = toy_session.generate("a", max_tokens=100)

    def failing(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] > after:
            raise RuntimeError("no memory")
        return type(draft).forward(draft, *arguments, **named)

    draft.forward = failing
    assert drafting.generate("a", max_tokens=100).token_ids == expected.token_ids
    stats = drafting.stats()
    assert 2 <= stats.failed_drafts < 12
    del draft.forward
    drafting.generate("a", max_tokens=30)
    assert drafting.stats().accepted_tokens > stats.accepted_tokens


def test_what_the_draft_cannot_read_is_answered_without(drafting: Session, toy_session: Session) -> None:
    """Pictures, whose features are the target's, and more tokens than the draft has positions for."""
    shown: Any = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}]
    picture = np.zeros((28, 28, 3), np.uint8)
    expected = toy_session.generate(shown, picture, max_tokens=30)
    assert drafting.generate(shown, picture, max_tokens=30).token_ids == expected.token_ids
    assert drafting.stats().drafted_tokens == 0
    assert drafting.engine._draft is not None
    drafting.engine._draft._capacity = 60
    expected = toy_session.generate("a", max_tokens=120)
    assert drafting.generate("a", max_tokens=120).token_ids == expected.token_ids
    assert 0 < drafting.stats().drafted_tokens < 60
    assert drafting.stats().failed_drafts == 0


def test_the_draft_reads_one_long_piece_at_a_time_while_others_decode(
    toy_session: Session, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its attention chunks are its own, larger ones."""
    draft, pieces = ToyBackend(), list[list[int]]()
    draft.spec = replace(draft.spec, attention_chunk_size=64)
    monkeypatch.setattr(Pace, "piece", lambda _: 32)
    guess = DraftModel._guess

    def counted(model: DraftModel, *arguments: Any) -> dict[int, list[int]]:
        draft.steps.clear()
        guessed = guess(model, *arguments)
        pieces.append([steps for _, steps in draft.steps if steps > SHORT])
        return guessed

    monkeypatch.setattr(DraftModel, "_guess", counted)
    prompts = ["x" * 90, "y" * 90, "z" * 90]
    plain = [toy_session.generate(prompt, max_tokens=60).token_ids for prompt in prompts]
    toy, limits = PackingToy(), EngineLimits(3, 200, speculate=2)
    with Session(toy, processor, context=200, batch=3, limits=limits, draft=draft) as session:
        gate = Gate(toy)
        streams = [session.stream(prompt, max_tokens=60) for prompt in prompts]
        gate.open(10_000)
        assert [stream.wait().token_ids for stream in streams] == plain
        assert session.stats().failed_drafts == 0
    assert max(map(len, pieces)) == 1
    assert sum(map(len, pieces)) >= 4


def test_the_session_closes_its_draft(drafting: Session) -> None:
    draft, closed = draft_of(drafting), [0]
    draft.close = lambda: closed.append(1)
    drafting.close()
    assert closed == [0, 1]


def test_a_draft_bundle_is_checked_and_used(workshop: Path, bundle: Path, tmp_path: Path) -> None:
    target = workshop / "bundles" / "fp32"
    with pytest.raises(ArrieroError, match="a draft bundle is given and speculate is 0; expected up to 15 tokens"):
        arriero.load(target, draft=target)
    with pytest.raises(ArrieroError, match="draft is 3; expected the path of a bundle directory"):
        arriero.load(target, draft=3, speculate=2)  # type: ignore[arg-type]
    with pytest.raises(
        ArrieroError, match=r"the draft has another tokenizer: .* has the id .*; expected the tokens of"
    ):
        arriero.load(target, draft=bundle, speculate=2, allow_unproven=True)
    arguments = ["run", str(target), "Say a word.", "--max-tokens", "20"]
    plain, drafted = run_command(*arguments), run_command(*arguments, "--speculate", "3", "--draft", str(target))
    assert (plain.code, drafted.code, drafted.out) == (0, 0, plain.out)
    assert "drafted" in drafted.err
    manifest = open_manifest(target)
    alone, both = session_bytes(manifest, 0), session_bytes(manifest, 0, manifest)
    assert both == 2 * alone


def test_memory_has_room_for_the_draft(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its keys and values count in the tokens that are admitted, its weights too under a cap."""
    target = workshop / "bundles" / "fp32"
    manifest = open_manifest(target)
    monkeypatch.setattr(api, "available_memory", lambda: 1 << 40)
    tokens = []
    for settings in ({}, {"speculate": 2, "draft": target}):
        with arriero.load(target, prefix_cache=0, **settings) as session:
            tokens.append(session.engine._scheduler.limits.tokens)
    assert tokens == [(1 << 40) // token_bytes(manifest), (1 << 40) // (2 * token_bytes(manifest))]
    options: list[BackendOptions] = []
    monkeypatch.setattr(api, "open_session", lambda _, given, *arguments, **named: options.append(given))
    for settings in ({}, {"speculate": 2, "draft": target}):
        arriero.load(target, memory="1GiB", **settings)
    caps = [given.memory.nbytes for given in options if given.memory is not None]
    assert caps == [1 << 30, (1 << 30) - session_bytes(manifest, 0)]


def test_tokens_are_compared_by_their_ids_and_kinds(bundle: Path, tmp_path: Path, processor: Processor) -> None:
    def changed(change: Callable[[dict[str, Any]], object]) -> Processor:
        folder = tmp_path / str(len([*tmp_path.iterdir()]))
        shutil.copytree(bundle / "tokenizer", folder)
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        change(tokenizer)
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        return Processor(folder, processor.spec)

    def swap(tokenizer: dict[str, Any]) -> None:
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    processor.check_same_tokens(changed(lambda tokenizer: None))
    with pytest.raises(ArrieroError, match=r"another tokenizer: '[ab]' has the id \d+, and \d+ here"):
        processor.check_same_tokens(changed(swap))
    plain = changed(lambda tokenizer: tokenizer["added_tokens"][3].update(special=False))
    with pytest.raises(ArrieroError, match=r"another tokenizer: '<\|header_end\|>' is special in one of them only"):
        processor.check_same_tokens(plain)
    other = Processor(bundle / "tokenizer", replace(processor.spec, eos_token_ids=(256,)))
    with pytest.raises(ArrieroError, match=r"another tokenizer: its eos_token_ids is \(256,\)"):
        processor.check_same_tokens(other)
