"""What counted repetitions come to, in regular expressions and in grammars."""

from __future__ import annotations

import pytest

from arriero.runtimes.repetitions import grammar_sizes, inline_schemas, regex_size


@pytest.mark.parametrize(
    ("pattern", "size"),
    [
        ("", 0),
        ("abc", 3),
        (r"a\d[a-z{]\{", 4),
        ("a{3}", 3),
        ("a{2,}b", 3),
        ("a{2,5}?b", 7),
        ("a*b+", 4),
        ("(ab){3}c", 7),
        ("(?:a{10}|b){10}c", 121),
        ("(?P<name>a{10}){10}", 100),
        ("((a{10}){10}){10}", 1000),
        ("[]a]{3}[^]b]{2}[[:alpha:]]{4}", 9),
        (r"[\]()]{3}", 3),
        ("(?i:a{3}){2}", 6),
        ("a{9999999999}", (1 << 15) + 1),
        ("(?x)(a{10} # )\n){10}", 120),  # not less than it is, where a group ends in a remark
        ("(a{10}", 10),
    ],
)
def test_characters_of_a_regular_expression(pattern: str, size: int) -> None:
    assert regex_size(pattern) >= size
    if "x)" not in pattern:
        assert regex_size(pattern) == size


def test_characters_of_a_grammar() -> None:
    """Terminals count where they are named, rules once, whatever stands between."""
    grammar = r"""
        start: "ab"~3 rule{2,4} (A "x"){10} // "c"~1000
        ?rule.2: rule start | A~2..5 -> name
        A: B~10 /d{7}[x"]/
        B: "c" /"{20}/
        LOOP: LOOP~2
    """
    sizes = grammar_sizes(grammar)
    assert sizes["B"] == 21
    assert sizes["A"] == 10 * 21 + 8
    assert sizes["start"] == 6 + 4 + 10 * (218 + 1)
    assert sizes["rule"] >= 2 + 5 * 218
    assert sizes["LOOP"] == 2
    assert list(inline_schemas('start: %json {"a": [1]} x\nx: %json { "b": {} }\ny: %json {')) == [
        {"a": [1]},
        {"b": {}},
    ]
