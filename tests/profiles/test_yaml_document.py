"""YAML as plain data: the core schema of YAML 1.2, lines of keys, and bounds on what a small file can grow to."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from arriero.errors import ArrieroError, Problems
from arriero.profiles.yaml_document import MAX_BYTES, MAX_DEPTH, MAX_VALUES, Document


def read(folder: Path, text: str) -> Document:
    file = folder / "a.yaml"
    file.write_text(text)
    return Document(file, "file", "Start anew")


def refused(folder: Path, text: str) -> str:
    with pytest.raises(ArrieroError) as caught:
        read(folder, text).raise_problems()
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((word, word) for word in ("yes", "no", "on", "off", "y", "N", "Yes", "OFF", "tRUE")),
        *((word, word) for word in ("12:30", "190:20:30.15", "1_000", "0b11", "0o8", "+0x1", "2001-01-01", "=", "<<")),
        *((word, word) for word in ("1e", ".", "e3", "1.2.3", "+.nan", "inf", "NaN", "nil")),
        ("010", 10),
        ("-0", 0),
        ("+7", 7),
        ("0o17", 15),
        ("0x1F", 31),
        ("1e-4", 1e-4),
        ("1.", 1.0),
        (".5", 0.5),
        ("-.INF", -math.inf),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("", None),
        ("'true'", "true"),
        ("'12'", "12"),
        ("!!str 12", "12"),
        ("!!int '0x1F'", 31),
        ("!!float '12'", 12.0),
        ("!!bool yes", "yes"),
        ("!!int 12:30", "12:30"),
    ],
)
def test_values_are_those_of_yaml_1_2(tmp_path: Path, text: str, value: Any) -> None:
    for head in ("", "%YAML 1.1\n---\n"):
        data = read(tmp_path, f"{head}a: {text}\n").data
        assert data == {"a": value}
        assert type(data["a"]) is type(value)


def test_not_a_number_is_one(tmp_path: Path) -> None:
    assert math.isnan(read(tmp_path, "a: .NaN").data["a"])


def test_keys_are_text_and_know_their_lines(tmp_path: Path) -> None:
    document = read(tmp_path, "on: 1\n1:\n  - x\n  - {no: 2,\n     ~: 3}\n")
    assert document.data == {"on": 1, "1": ["x", {"no": 2, "~": 3}]}
    assert document.where(("1", 1, "~")).endswith("a.yaml:5: 1[1].~")
    assert document.where(("1", 1, "gone", "further")).endswith("a.yaml:4: 1[1].gone.further")
    assert document.where(()).endswith("a.yaml:1")


def test_an_alias_is_what_its_anchor_is(tmp_path: Path) -> None:
    assert read(tmp_path, "a: &x {b: 1}\nc: [*x, *x]\n").data == {"a": {"b": 1}, "c": [{"b": 1}, {"b": 1}]}


def test_a_key_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    with pytest.raises(Problems) as caught:
        read(tmp_path, "a: 1\nb:\n  c: 1\n  d: 1\n  c: 2\n'a': 3\n").raise_problems()
    first, second = (str(problem) for problem in caught.value.problems)
    assert first.endswith("a.yaml:5: c: is there twice, first on line 3. Remove one of the two.")
    assert second.endswith("a.yaml:6: a: is there twice, first on line 1. Remove one of the two.")


def test_aliases_that_multiply_are_refused(tmp_path: Path) -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
    text = refused(tmp_path, bomb)
    assert "holds too many values; expected at most 10,000 values, those of aliases counted each time" in text
    assert "a.yaml:5: a4" in text
    fits = MAX_VALUES - 2  # beside the mapping and the list
    assert len(read(tmp_path, f"a: [{'x,' * fits}]").data["a"]) == fits
    assert "holds too many values" in refused(tmp_path, f"a: [{'x,' * (fits + 1)}]")


def test_nesting_and_size_are_bounded(tmp_path: Path) -> None:
    deepest = MAX_DEPTH - 2  # beside the mapping and the innermost value
    assert read(tmp_path, f"a: {'[' * deepest}1{']' * deepest}").data["a"]
    assert "a.yaml:3: nests too deep; expected at most 32" in refused(tmp_path, "\n\na: " + "[" * (deepest + 1) + "1")
    assert "nests too deep" in refused(tmp_path, "".join(f"{' ' * n}a:\n" for n in range(400)))
    assert read(tmp_path, "a: 1\n" + "#" * (MAX_BYTES - 5)).data == {"a": 1}
    assert "a.yaml: is too large; expected a file of at most 256 KiB. Start anew." in refused(
        tmp_path, "a: 1\n" + "#" * (MAX_BYTES - 4)
    )


def test_a_mapping_that_holds_itself_is_refused(tmp_path: Path) -> None:
    assert "a.yaml:2: a.b: an alias contains itself" in refused(tmp_path, "a: &x\n  b: *x\n")


def test_code_is_never_run(tmp_path: Path) -> None:
    text = refused(tmp_path, "a: !!python/object/apply:os.getcwd []\nb: !!binary aGk=\n")
    assert "the YAML tag" in text
    assert "binary has no meaning in this file" in text
