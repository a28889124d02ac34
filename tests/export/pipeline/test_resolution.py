"""`plan` says how many cases a threshold on accuracy needs, and is silent where there are enough."""

from __future__ import annotations

from collections import Counter

import pytest

from arriero.export.build_file.schema import Cases
from arriero.export.pipeline.resolution import weak_thresholds
from arriero.export.samples.cases import draw_cases, scored_counts
from arriero.runtimes.proof.paired import cases_needed

COUNTS = {"recall": 100, "arithmetic": 100}


def test_too_few_cases_are_told_with_what_they_show() -> None:
    (told,) = weak_thresholds("phone", {"router_agreement": 0.99, "task_accuracy_drop": 0.005}, COUNTS)
    assert told.startswith("target phone: task_accuracy_drop at most 0.5 %: ")
    assert f"{cases_needed(0.005, 0.01):,} scored cases tell a drop of 1 points" in told
    assert told.endswith("the parity set has 200, which show a drop from 2.0 points on")


def test_a_family_is_counted_alone() -> None:
    (told,) = weak_thresholds("phone", {"task_accuracy_drop.recall": 0}, COUNTS)
    assert "the parity set has 100, which" in told
    assert weak_thresholds("phone", {"task_accuracy_drop.colour": 0}, COUNTS) == []


@pytest.mark.parametrize("limit", [0.02, 0.05])
def test_enough_cases_need_no_word(limit: float) -> None:
    enough = {"recall": cases_needed(limit, 2 * limit)}
    assert weak_thresholds("phone", {"task_accuracy_drop": limit}, enough) == []
    assert weak_thresholds("phone", {"task_accuracy_drop": limit}, {"recall": enough["recall"] - 1})


def test_a_limit_beyond_all_drops_needs_no_word() -> None:
    assert weak_thresholds("phone", {"task_accuracy_drop": 1.0}, {"recall": 2}) == []


@pytest.mark.parametrize("modalities", [("text",), ("text", "image")])
@pytest.mark.parametrize("samples", [1, 7, 20])
def test_embedded_cases_are_counted_as_they_are_drawn(samples: int, modalities: tuple[str, ...]) -> None:
    wanted = Cases(samples=samples, seed=3)
    assert scored_counts(wanted, modalities) == Counter(case.family for case in draw_cases(wanted, modalities))
