"""A parity report on a terminal: the verdict last, and at 80 columns, as in a log, no row of many lines."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from arriero.export.cli.show_parity import show_parity
from arriero.runtimes.proof.report import ParityReport
from arriero.runtimes.proof.rows import judge
from tests.runtimes.proof.test_report import make_report


def shown(report: ParityReport, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    show_parity(report, console)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


@pytest.mark.parametrize("width", [80, 140, 300])
def test_the_report_ends_with_failures_and_the_verdict(width: int) -> None:
    text = shown(make_report(), width)
    assert text.index("Logits, largest error") < text.index("Router agreement, lowest layer")
    assert text.rstrip().endswith("2 of 4 judged rows failed")
    passing = replace(make_report(), rows=(judge("nonfinite_values", 0.0, 0.0, ""),))
    assert shown(passing, width).rstrip().endswith("all 1 judged rows passed")


def test_a_long_detail_makes_no_row_of_many_lines() -> None:
    detail = "layer 7: 5 of 5760 clear choices differ; apart: 3 of 12 near ties, which the reference itself leaves open"
    report = replace(make_report(), rows=(judge("router_agreement_lowest", 0.9951, 0.998, detail),) * 29)
    lines = shown(report, 80).splitlines()
    assert len(lines) <= 29 * 5
    assert max(map(len, lines)) <= 80
    assert lines[:2] == ["Router agreement, lowest layer", "  value   99.51 %, at least 99.8 %, FAIL"]
    assert "layer 7: 5 of 5760 clear choices differ; apart: 3 of 12 near ties" in lines[2]


def test_a_warning_is_told() -> None:
    report = replace(make_report(), families=tuple(replace(one, reference_right=0) for one in make_report().families))
    (warning,) = report.warnings
    assert f"warning: {warning}" in " ".join(shown(report, 80).split())
