"""A failed row is told with value, limit, cause and remedy."""

from __future__ import annotations

import pytest

from arriero.errors import UNEXPECTED, BelowThreshold, MachineLacks
from arriero.export.pipeline.explain_failure import explain_failures, thin_experts
from arriero.export.pipeline.results import TargetResult, worst_code
from arriero.profiles.recipe import load_profile
from arriero.runtimes.proof.paired import Pairs
from arriero.runtimes.proof.report import FamilyScore, LayerSeries, ParityReport
from arriero.runtimes.proof.rows import Row, judge, judge_drop

THIN = {"0": [16] * 24, "1": [10] * 30 + [500] * 2, "2": [15] * 10 + [16] * 30}
ENOUGH = {"0": [16] * 24}
LAYER = LayerSeries(3, "chunked", "moe", 0.25, 12.0, 0.9, 0, 0, 4)
FAMILIES = (FamilyScore("recall", 20, 19, 12, 8, 1), FamilyScore("sum", 20, 20, 19, 1, 0))


def report(*rows: Row, layers: tuple[LayerSeries, ...] = ()) -> ParityReport:
    return ParityReport(rows, layers, FAMILIES, (), 0.01, "generated")


def test_calibration_that_too_few_tokens_reached() -> None:
    failed = report(judge("kl_over_rtn", 0.502, 0.5, "of 200 cases"))
    (failure,) = explain_failures({None: failed}, load_profile("int4"), THIN)
    assert str(failure) == (
        "KL 50.20 % of the RTN baseline's, limit at most 50 %; 40 of 96 experts had fewer than "
        "16 calibration tokens, most in layer 1 (30): add samples to `calibration`, or others that reach them"
    )


@pytest.mark.parametrize(
    ("row", "layers", "words"),
    [
        (judge("kl_over_rtn", 0.9, 0.5, "d"), (), ("gains too little over rounding", "add samples")),
        (
            judge("router_agreement", 0.9, 0.99, "d"),
            (LAYER,),
            ("layer 3 is furthest off, relative error 0.25", "finer"),
        ),
        (judge("router_agreement", 0.9, 0.99, "the detail"), (), ("the detail", "finer profile")),
        (judge("vision_relative_l2", None, 0.1, "no case shows an image"), (), ("not measured", "give the parity set")),
        (judge("task_accuracy_reference", 0.2, 0.9, "d"), (), ("itself answers these cases wrong", "chat template")),
        (judge("nonfinite_values", 3, 0, "in layer 2"), (), ("in layer 2", "wider number format")),
        (judge_drop("task_accuracy_drop", Pairs(40, 9, 1), 0.0, "d"), (LAYER,), ("lost in recall (8 of 20)", "finer")),
    ],
)
def test_cause_and_remedy_of_each_kind(row: Row, layers: tuple[LayerSeries, ...], words: tuple[str, ...]) -> None:
    assert row.status == "fail"
    (failure,) = explain_failures({None: report(row, layers=layers)}, load_profile("int4"), ENOUGH)
    for word in words:
        assert word in str(failure)


@pytest.mark.parametrize(("share", "cause"), [(0.8, "flipped routing causes 80 % of the KL"), (0.2, "layer 3 is")])
def test_routing_is_named_where_most_of_the_kl_is_its(share: float, cause: str) -> None:
    rows = judge("logits_kl_mean", 0.2, 0.1, "d"), judge("logits_kl_routing_share", share, None, "d")
    (failure,) = explain_failures({None: report(*rows, layers=(LAYER,))}, load_profile("int4"), ENOUGH)
    assert cause in str(failure)


def test_who_has_enough_says_nothing() -> None:
    assert thin_experts(load_profile("int4"), ENOUGH) is None
    assert thin_experts(load_profile("int8"), THIN) is None  # it does not calibrate
    assert explain_failures({None: report(judge("router_agreement", 1.0, 0.99, "d"))}, load_profile("int4"), THIN) == ()


def test_the_code_of_a_build_is_the_highest_of_its_targets(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("out")
    good, unproven = TargetResult("a", folder, "published"), TargetResult("b", folder, "unproven", device="a GPU")
    failed = TargetResult("c", folder, "failed", error=BelowThreshold("c"))
    lacking = TargetResult("d", folder, "not built", error=MachineLacks("d"))
    faulty = TargetResult("e", folder, "not built", error=ZeroDivisionError())
    assert [worst_code([*results]) for results in ((), (good, unproven), (good, failed), (failed, lacking))] == [
        0,
        0,
        1,
        3,
    ]
    assert worst_code([failed, lacking, faulty, good]) == UNEXPECTED
    assert worst_code([good, unproven], require_proof=True) == 3


def test_what_failed_with_an_adapter_is_told_beside_what_failed_without() -> None:
    bad = report(judge("router_agreement", 0.9, 0.99, "the detail"), layers=(LAYER,))
    other = report(judge("router_agreement", 0.8, 0.99, "another detail"))
    good = report(judge("router_agreement", 1.0, 0.99, "d"))
    reports = {None: bad, "german": other, "french": good}
    first, second = explain_failures(reports, load_profile("int8"), ENOUGH)
    assert (first.adapter, first.cause) == (None, "layer 3 is furthest off, relative error 0.25")
    assert (second.adapter, second.cause) == ("german", "another detail")
    assert str(second).startswith("Router agreement with german 80.00 %, limit at least 99 %; another detail: ")
