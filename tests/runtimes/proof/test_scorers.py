"""Answers are judged alike on every machine, by a scorer's name."""

from __future__ import annotations

import pytest

from arriero.errors import ArrieroError
from arriero.runtimes.proof.scorers import accuracy, same_answer, score

RIGHT = "a red square at the top left."


def test_the_same_answer_is_blind_to_case_spacing_and_a_full_stop():
    assert same_answer(RIGHT, RIGHT)
    assert same_answer(RIGHT, "  " + RIGHT.upper().rstrip(".") + " ")
    assert not same_answer(RIGHT, RIGHT + " and more")
    assert not same_answer(RIGHT, "")
    assert accuracy([RIGHT, RIGHT], [RIGHT, "no"]) == 0.5


def test_an_unknown_scorer_is_refused_with_those_there_are():
    assert score("same_answer", "42", " 42.")
    with pytest.raises(ArrieroError, match="no scorer 'bleu'; expected one of same_answer"):
        score("bleu", "42", "42")
