"""Drafted tokens change how soon an answer comes and nothing else, whether they are right, wrong, or right at first."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

import arriero
from arriero.errors import ArrieroError
from arriero.runtimes.processor.processor import Prompt
from arriero.runtimes.prompt_lookup import PromptLookup
from arriero.runtimes.scheduler import EngineLimits, Scheduler
from arriero.runtimes.session import Session
from tests.command import arriero as run_command
from tests.runtimes.conftest import CHUNK, PackingToy
from tests.runtimes.gate import Gate

MOST = 5
Draft = TypeVar("Draft", bound=Callable[..., list[int]])
PROMPTS = ("Say a word.", "What is 17 + 25? " * 9, "a", "List the colours of the rainbow, " * 4)


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int64)


def test_what_followed_the_same_tokens_last_time_is_drafted() -> None:
    lookup = PromptLookup(ids(1, 2, 3, 4, 5, 9, 2, 3, 4, 6, 8, 8, 2, 3), most=3, never=7)
    assert lookup.draft([], 9) == [4, 6, 8]  # two tokens are the same, and the later place counts
    assert lookup.draft([4, 5], 9) == [9, 2, 3]  # 3, 4, 5 have been there
    assert lookup.draft([4, 5, 9], 2) == [2, 3]
    assert lookup.draft([4, 5, 9], 0) == []
    assert lookup.draft([4, 5, 9, 1], 9) == []  # 9, 1 has not
    assert PromptLookup(ids(1), 3, None).draft([], 3) == []


def test_nothing_is_drafted_from_a_placeholder_of_a_picture_on() -> None:
    assert PromptLookup(ids(1, 2, 3, 7, 4, 1, 2), most=3, never=7).draft([], 3) == [3]


def test_drafts_grow_with_hits_and_come_later_after_misses() -> None:
    lookup = PromptLookup(ids(*[1, 2, 3, 4, 5, 6] * 3), most=4, never=None)
    assert lookup.draft([], 9) == [1, 2, 3, 4]
    lookup.learn(4, 2)
    assert lookup.draft([], 9) == [1, 2]
    lookup.learn(2, 2)
    assert lookup.draft([], 9) == [1, 2, 3, 4]
    for pause in (1, 2, 4):
        lookup.learn(1, 0)
        assert [len(lookup.draft([], 9)) for _ in range(pause + 1)] == [0] * pause + [1]
    lookup.learn(1, 1)
    lookup.learn(1, 0)
    assert [len(lookup.draft([], 9)) for _ in range(2)] == [0, 1]


def test_a_long_answer_is_looked_up_as_a_prompt_is() -> None:
    tokens = np.random.default_rng(0).integers(0, 50, 2000).tolist()
    lookup, answer = PromptLookup(ids(*tokens[:10]), most=2, never=None), tokens[10:]
    whole = PromptLookup(ids(*tokens), most=2, never=None)
    for end in range(0, len(answer), 7):
        lookup.draft(answer[:end], 2)
    assert lookup.draft(answer, 2) == whole.draft([], 2) != []


class Oracle:
    """Drafts what was answered before, of which every `wrong`-th token is another one."""

    def __init__(self, answers: list[arriero.Generation], wrong: int) -> None:
        self.answers, self.wrong, self.drafted = answers, wrong, 0

    def __call__(self, lookup: PromptLookup, answer_ids: list[int], room: int) -> list[int]:
        known = next(one.token_ids for one in self.answers if one.token_ids[: len(answer_ids)] == answer_ids)
        drafted = known[len(answer_ids) :][: max(room, 0)]
        self.drafted += len(drafted)
        return [token if (len(answer_ids) + i) % self.wrong else token ^ 1 for i, token in enumerate(drafted)]


def speculate(session: Session, monkeypatch: pytest.MonkeyPatch, draft: Draft) -> Draft:
    """Let `session` draft from now on, as `draft` does instead of looking up."""
    session.engine._scheduler = Scheduler(session.spec, EngineLimits(4, session.context, speculate=MOST))
    monkeypatch.setattr(PromptLookup, "draft", lambda *arguments: draft(*arguments))
    return draft


def likelihoods(generation: arriero.Generation) -> np.ndarray:
    assert generation.logprobs is not None
    return np.array([[entry.logprob, *(value for _, value in entry.top)] for entry in generation.logprobs])


@pytest.mark.parametrize("wrong", [1, 3, 10_000])
def test_answers_are_those_without_drafts(whole: Session, wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone and together, greedy and drawn, over chunks' edges."""
    cases: list[dict[str, Any]] = [
        {"prompt": text, "max_tokens": 20 + 7 * number, "temperature": number % 2 * 0.8, "seed": 3, "logprobs": 2}
        for number, text in enumerate(PROMPTS)
    ]
    plain = [whole.generate(**case) for case in cases]
    steps = whole.stats().steps
    oracle = speculate(whole, monkeypatch, Oracle(plain, wrong))
    drafted = [whole.generate(**case) for case in cases]
    stats = whole.stats()
    assert stats.drafted_tokens == oracle.drafted > 0
    if wrong == 1:
        assert stats.accepted_tokens == 0
    elif wrong == 10_000:
        assert stats.accepted_tokens == stats.drafted_tokens
        assert stats.steps < 0.5 * steps
    else:
        assert 0 < stats.accepted_tokens < stats.drafted_tokens
    with ThreadPoolExecutor(len(cases)) as pool:
        together = list(pool.map(lambda case: whole.generate(**case), cases))
    for found in (drafted, together):
        for one, other in zip(plain, found, strict=True):
            assert (one.text, one.token_ids, one.finish_reason) == (other.text, other.token_ids, other.finish_reason)
            np.testing.assert_allclose(likelihoods(one), likelihoods(other), atol=1e-5)


def test_rows_of_a_step_draft_where_they_may_share_it(toy_session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    toy: Any = toy_session.backend
    lengths = {"a": 30, "bc": 24}
    plain = [toy_session.generate(prompt, max_tokens=most) for prompt, most in lengths.items()]
    speculate(toy_session, monkeypatch, Oracle(plain, 4))
    toy.steps.clear()
    gate = Gate(toy)
    streams = [toy_session.stream(prompt, max_tokens=most) for prompt, most in lengths.items()]
    gate.open(10_000)
    for one, stream in zip(plain, streams, strict=True):
        assert stream.wait().token_ids == one.token_ids
    packs = isinstance(toy, PackingToy)
    assert packs == any(
        min(counts) > 0 and max(counts) > 1 and len(counts) == 2 for counts in getattr(toy, "packed", ())
    )
    assert toy_session.stats().accepted_tokens > 0


def test_an_answer_ends_where_it_ends_and_a_conversation_goes_on_from_there(
    toy_session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a stop text and by a token, in the middle of a draft that is right; what lies behind is forgotten."""

    def converse() -> list[str]:
        chat = toy_session.chat(max_tokens=40)
        found = [chat.send("hello", stop=stop).text, chat.send("and then?").text]
        return [*found, toy_session.generate("x", max_tokens=40, stop_token_ids=[token]).text]

    whole = toy_session.generate("x", max_tokens=40)
    token = whole.token_ids[13]
    stop = [toy_session.chat(max_tokens=40).send("hello").text[11:14]]
    expected = converse()
    answers = [toy_session.chat(max_tokens=40).send("hello"), whole]
    follow = toy_session.chat(max_tokens=40)
    follow.send("hello", stop=stop)
    answers.append(follow.send("and then?"))
    speculate(toy_session, monkeypatch, Oracle(answers, 10_000))
    assert converse() == expected
    assert toy_session.stats().accepted_tokens > 20


def test_a_draft_stays_within_the_chunk_and_the_answer(toy_session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    rooms: list[tuple[int, int]] = []

    def draft(lookup: PromptLookup, answer_ids: list[int], room: int) -> list[int]:
        rooms.append((len(answer_ids), room))
        return [5] * max(room, 0)

    speculate(toy_session, monkeypatch, draft)
    toy_session.generate(Prompt(np.arange(3) + 3), max_tokens=14)
    for answered, room in rooms:
        held = 3 + answered - 1
        assert room <= min(MOST, 14 - answered - 1)
        assert held // CHUNK == (held + 1 + max(room, 0)) // CHUNK or room <= 0
    assert max(room for _, room in rooms) == MOST


def test_a_step_with_drafts_that_fails_is_taken_apart(toy_session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    toy: Any = toy_session.backend
    expected = toy_session.generate("a", max_tokens=20)
    forward = toy.forward

    def broken(embeds: Any, positions: Any, cache: Any, index: Any, captures: bool = False) -> Any:
        if embeds.shape[1] > 1 and len(index) > 1:
            raise ArrieroError("no step of drafts")
        return forward(embeds, positions, cache, index, captures)

    toy.forward = broken
    speculate(toy_session, monkeypatch, Oracle([expected], 10_000))
    assert toy_session.generate("a", max_tokens=20).token_ids == expected.token_ids
    assert toy_session.stats().accepted_tokens == 0


def test_logits_behind_a_wrong_draft_are_not_looked_at(toy_session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    toy: Any = toy_session.backend
    expected = toy_session.generate("a", max_tokens=20)
    forward = toy.forward

    def unsound(*arguments: Any) -> Any:
        out = forward(*arguments)
        if len(arguments[3]) > 1:
            out.logits[:, 1:] = np.nan
        return out

    toy.forward = unsound
    speculate(toy_session, monkeypatch, Oracle([expected], 1))
    assert toy_session.generate("a", max_tokens=20).token_ids == expected.token_ids


@pytest.mark.parametrize("wrong", [-1, 16])
def test_how_many_may_be_drafted(workshop: Path, wrong: int) -> None:
    with pytest.raises(ArrieroError, match=f"speculate is {wrong}; expected 0, or up to 15 tokens"):
        arriero.load(workshop / "bundles" / "fp32", speculate=wrong)


def test_the_command_says_how_many_drafts_were_right(workshop: Path) -> None:
    bundle, prompt = str(workshop / "bundles" / "fp32"), "one two three one two three one two three"
    arguments = ["run", bundle, prompt, "--max-tokens", "48"]
    plain, drafted = run_command(*arguments), run_command(*arguments, "--speculate", "4")
    assert (plain.code, drafted.code, drafted.out) == (0, 0, plain.out)
    assert "drafted" in drafted.err
    assert "drafted" not in plain.err
    assert run_command(*arguments, "--json", "--speculate", "4").json["text"] + "\n" == plain.out
