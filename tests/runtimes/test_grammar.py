"""Answers in a form: whatever the model would rather say, what comes out is what was asked for."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest

import arriero
from arriero.errors import ArrieroError
from arriero.runtimes.session import Session

pytest.importorskip("llguidance", reason="needs llguidance: pip install 'arriero[structured]'")

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
NAMED: dict[str, Any] = {f"a{number}": {"type": "integer"} for number in range(1001)}
ADD: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": [1, 2]}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(params=["onnxruntime", "tvm"])
def session(request: pytest.FixtureRequest) -> Iterator[Session]:
    workshop = request.getfixturevalue("tvm_workshop" if request.param == "tvm" else "workshop")
    with arriero.load(workshop / "bundles" / "fp32", threads=2, batch=6) as opened:
        yield opened


def check(answer: arriero.Generation) -> None:
    said = json.loads(answer.text)
    assert set(said) == {"name", "age", "tags"}
    assert isinstance(said["name"], str)
    assert len(said["name"]) <= 8
    assert 0 <= said["age"] <= 150
    assert set(said["tags"]) <= {"a", "b"}
    assert len(said["tags"]) <= 3
    assert answer.finish_reason == "stop"


def test_an_answer_keeps_to_its_form_while_others_do_not(session: Session) -> None:
    """Greedy and drawn hot, together with answers of other forms and of none, which are what they are alone."""
    free = session.generate("Hello", max_tokens=20).token_ids
    streams = [
        session.stream("Who?", max_tokens=250, temperature=temperature, seed=seed, json_schema=schema)
        for seed, (temperature, schema) in enumerate([(0.0, SCHEMA), (1.0, json.dumps(SCHEMA)), (3.0, SCHEMA)])
    ]
    others = {
        "regex": session.stream("When?", max_tokens=40, temperature=2.0, seed=1, regex=r"[0-9]{4}-[0-9]{2}"),
        "choice": session.stream("Which?", max_tokens=40, temperature=2.0, seed=2, choice=["red", 'dark "blue"']),
        "grammar": session.stream("Sum?", max_tokens=60, seed=3, grammar='start: /[1-9]/ ("+" /[1-9]/)~2'),
    }
    assert session.generate("Hello", max_tokens=20).token_ids == free
    for stream in streams:
        check(stream.wait())
    assert re.fullmatch(r"[0-9]{4}-[0-9]{2}", others["regex"].wait().text)
    assert others["choice"].wait().text in ("red", 'dark "blue"')
    assert re.fullmatch(r"[1-9]\+[1-9]\+[1-9]", others["grammar"].wait().text)


def test_the_same_seed_says_the_same_and_log_probabilities_are_the_models(session: Session) -> None:
    settings: dict[str, Any] = {"max_tokens": 8, "seed": 5, "temperature": 1.5, "logprobs": 1}
    first, again = (session.generate("x", choice=["yes", "no"], **settings) for _ in range(2))
    assert first.token_ids == again.token_ids
    free = session.generate("x", **settings)
    assert first.logprobs is not None
    assert free.logprobs is not None
    ((token, chance),), ((free_token, free_chance),) = first.logprobs[0].top, free.logprobs[0].top
    assert token == free_token
    assert chance == pytest.approx(free_chance, abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"json_schema": {"type": "bla"}}, "json_schema cannot be enforced: Invalid type: bla"),
        ({"json_schema": "{"}, "json_schema:1: is not valid JSON"),
        ({"json_schema": "[]"}, "json_schema is .*; expected a JSON object"),
        ({"json_schema": 3}, "json_schema is 3; expected a mapping"),
        ({"regex": "(a"}, "regex cannot be enforced: .*unclosed group"),
        ({"regex": 3}, "regex is 3; expected a text"),
        ({"grammar": "start: x"}, "grammar cannot be enforced: .*unknown name"),
        ({"regex": "\ud800"}, "regex: holds half of a surrogate pair; expected text"),
        ({"grammar": "\ud800"}, "grammar: holds half of a surrogate pair; expected text"),
        ({"choice": []}, r"choice is \[\]; expected a list of texts"),
        ({"choice": "yes"}, "choice is 'yes'; expected a list of texts"),
        ({"choice": ["a"], "regex": "a"}, "regex and choice each say what the answer must be"),
        ({"choice": [*map(str, range(1001))]}, "choice has 1,001 texts; expected at most 1,000"),
        ({"choice": ["a" * (1 << 16), "b"]}, "choice has 65,537 characters; expected at most 65,536"),
        ({"regex": "a?" * 5000}, "regex has 10,000 characters; expected at most 8,192"),
        ({"grammar": 'start: "a"' + " " * (1 << 14)}, "grammar has 16,394 characters; expected at most 16,384"),
        ({"json_schema": {"const": "a" * (1 << 16)}}, "json_schema has 65,549 characters; expected at most 65,536"),
        ({"json_schema": {"items": {"properties": NAMED}}}, "json_schema has 1,001 properties of one object; expected"),
        ({"json_schema": {"enum": [{"a": n} for n in range(2001)]}}, "json_schema has 2,001 entries of properties"),
        ({"json_schema": {"anyOf": [*NAMED.values()]}}, "json_schema has 1,001 entries of anyOf, oneOf and allOf"),
        (
            {"json_schema": {"patternProperties": {f"^{n}$": {} for n in range(65)}}},
            "has 65 entries of patternPro",
        ),
        ({"json_schema": {"items": {"pattern": "a?" * 5000}}}, "json_schema's patterns has 10,000 characters"),
        ({"regex": "(a{1000}){1000}"}, "regex comes to 1,000,000 characters .*; expected at most 32,768"),
        ({"json_schema": {"items": {"pattern": "(a{9}){9999}"}}}, "json_schema's patterns comes to 89,992 characters"),
        ({"json_schema": {"patternProperties": {"(a{9}){9999}": {}}}}, "json_schema's patterns comes to 89,992 char"),
        ({"grammar": 'start: A\nA: B~200\nB: "ab"~200'}, "grammar comes to 80,000 characters .*; expected at most 32"),
        ({"grammar": 'start: %json {"pattern": "(a{200}){200}"}'}, "json_schema's patterns comes to 40,001 characters"),
    ],
)
def test_a_form_that_cannot_be_enforced_is_refused_before_anything_runs(
    session: Session, settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ArrieroError, match=sentence):
        session.generate("x", **settings)
    assert session.stats().prefilled_tokens == 0


def test_forms_up_to_their_most_are_read_soon_and_remarks_count_for_nothing(session: Session) -> None:
    session.generate("x", max_tokens=1, regex="a")
    properties = dict([*NAMED.items()][:1000])
    told: dict[str, Any] = {"description": "d" * 100_000, "required": [*properties], "properties": properties}
    for form in ({"json_schema": told}, {"choice": [*NAMED][:1000]}, {"regex": "a?" * 4096}):
        start = time.monotonic()
        session.generate("x", max_tokens=1, **form)
        assert time.monotonic() - start < 10  # a second, where no other test runs
