"""JSON schemas are enforced to the letter or refused: by hand, and as JSON-Schema-Test-Suite has it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import arriero

pytest.importorskip("llguidance", reason="needs llguidance: pip install 'arriero[structured]'")
pytest.importorskip("jsonschema", reason="needs jsonschema, which carries the suite and judges answers")

from tests.long.json_schema_suite import Judge, check, read_cases, sample
from tests.long.released_package import NotFetchedError


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge()


@pytest.mark.parametrize(
    ("schema", "passing", "stopped"),
    [
        ({"properties": {"a": {"type": "integer"}}}, ['{"a": 1}', '{"b": "x"}'], ['{"a": "x"}', r'{"\u0061": "x"}']),
        ({"format": "date"}, ['"2024-02-29"', '"2000-02-29"', "1"], ['"2023-02-29"', '"1900-02-29"', '"2024-04-31"']),
        ({"format": "time"}, ['"23:59:59Z"'], ['"23:58:60Z"', '"24:00:00Z"']),
        ({"format": "date-time"}, ['"2024-02-29T10:00:00Z"'], ['"2023-02-29T10:00:00Z"', '"2024-02-29T10:00:60Z"']),
        ({"type": "string", "pattern": r"^\s\S$"}, ['"\ufeffa"'], ['" \ufeff"', '"\u0085a"']),
        ({"patternProperties": {r"^\s": {"type": "null"}}}, ['{"\ufeffa": null}'], ['{"\ufeffa": 1}']),
        ({"required": ["a"], "minProperties": 2}, ['{"a": 1, "b": 1}'], ['{"a": 1}', '{"a": 1, "a": 1}']),
        ({"type": "string", "pattern": r"^[^\x00-\x1f]$"}, ['"a"'], [r'"\n"', '""']),
        ({"properties": {"const": {"format": "date"}}}, ['{"const": "2024-02-29"}'], ['{"const": "2023-02-29"}']),
        ({"type": "integer", "format": "int32"}, ["2147483647", "-7"], ["2147483648", "1.5"]),
        ({"type": "integer", "format": "int64"}, ["461168601842738790"], ["9223372036854775808", '"x"']),
        ({"type": "number", "format": "double", "maximum": 2}, ["1.5"], ["2.5"]),
        ({"const": {"format": "date"}}, ['{"format": "date"}'], ['{"format": "2024-02-29"}']),
    ],
)
def test_what_passes_a_schema(judge: Judge, schema: Any, passing: list[str], stopped: list[str]) -> None:
    assert [text for text in passing if not judge.passes(schema, text)] == []
    assert [text for text in stopped if judge.passes(schema, text)] == []


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"minProperties": 2}, "enforced: minProperties asks for names"),
        ({"properties": {"a": {"minProperties": 2}}}, r"enforced: properties\.a\.minProperties asks for names"),
        ({"const": "a\0b"}, "const has a control character"),
        ({"enum": [["a\x7fb"]]}, "enum has a control character"),
        ({"pattern": r"a\x00b"}, r"the pattern .* names a control character"),
        ({"pattern": "a\x01b"}, "names a control character"),
        ({"allOf": [{"pattern": r"a\vb"}, {"const": "\0"}]}, r"allOf\.the pattern .*; allOf\.const has a control"),
        ({"x-guidance": {"lenient": True}, "not": {"const": 1}}, "Unimplemented keys: ..not"),
        ({"x-guidance": {"coerce_one_of": True}, "oneOf": [{"type": "number"}, {"type": "integer"}]}, "oneOf"),
        (True, "json_schema is True; expected a JSON object"),
    ],
)
def test_what_cannot_be_enforced_is_refused(judge: Judge, schema: Any, reason: str) -> None:
    refusal = judge.refusal(schema)
    assert refusal is not None
    assert re.search(reason, refusal), refusal


def test_the_suite_finds_every_schema_enforced_or_refused(judge: Judge, workshop: Path) -> None:
    """The whole of it by its instances, and what a model of random weights writes under every tenth schema."""
    try:
        cases = read_cases()
    except NotFetchedError as error:
        pytest.skip(str(error))
    outcome = check(cases, judge)
    assert len(outcome.enforced) > 190
    assert sum(test["valid"] for case in outcome.enforced for test in case.tests) > 500
    with arriero.load(workshop / "bundles" / "fp32", threads=2, batch=4) as session:
        sample(session, outcome.enforced[::10], 2, outcome)
    assert outcome.faults == []
    assert outcome.samples - outcome.unfinished > 10
