"""JUnit XML: a suite per bundle, a case per judged row, and what was not built or proven says so."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

from arriero.runtimes.proof.junit import Suite, write_junit
from arriero.thresholds import METRICS
from tests.runtimes.proof.test_report import make_report


def written(path: Path, *suites: Suite) -> ET.Element:
    write_junit(suites, path)
    return ET.parse(path).getroot()


def test_a_case_per_judged_row_and_a_failure_per_failed_row(tmp_path: Path) -> None:
    report = make_report()
    causes = {(None, "vision_relative_l2"): "because: mend it"}
    (suite,) = written(tmp_path / "out" / "parity.xml", Suite("int8", {None: report}, 2.5, causes))
    cases = {case.get("name"): case for case in suite.iter("testcase")}
    assert list(cases) == [row.metric for row in report.rows if row.status != "info"]
    assert (suite.get("name"), suite.get("time")) == ("int8", "2.500")
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == (str(len(cases)), "2", "0")
    failed = {name for name, case in cases.items() if case.find("failure") is not None}
    assert failed == {"router_agreement_lowest", "vision_relative_l2"}
    failure = cases["router_agreement_lowest"].find("failure")
    assert failure is not None
    told = "Router agreement, lowest layer: 99.51 %, at least 99.8 %. layer 7 <script>"
    assert str(failure.get("message")).startswith(told)
    assert cases["vision_relative_l2"].findtext("failure") == "because: mend it"
    assert failure.text == METRICS["router_agreement_lowest"].meaning


def test_rows_of_adapters_stand_in_the_bundles_suite(tmp_path: Path) -> None:
    report = make_report()
    judged = [row.metric for row in report.rows if row.status != "info"]
    (suite,) = written(tmp_path / "parity.xml", Suite("int8", {None: report, "german": report}, 2.5))
    names = [case.get("name") for case in suite.iter("testcase")]
    assert names == [*judged, *(f"{name} with german" for name in judged)]
    assert (suite.get("tests"), suite.get("failures")) == (str(len(names)), "4")


def test_a_cause_is_that_of_its_own_row(tmp_path: Path) -> None:
    """The model and each adapter have rows of the same metrics, and they fail for reasons of their own."""
    metric, reports = "vision_relative_l2", {None: make_report(), "german": make_report()}
    causes = {(None, metric): "the model's", ("german", "router_agreement_lowest"): "the adapter's"}
    (suite,) = written(tmp_path / "parity.xml", Suite("int8", reports, 2.5, causes))
    told = {case.get("name"): case.findtext("failure") for case in suite.iter("testcase")}
    assert (told[metric], told["router_agreement_lowest with german"]) == ("the model's", "the adapter's")
    assert told[f"{metric} with german"] == METRICS[metric].meaning
    assert told["router_agreement_lowest"] == METRICS["router_agreement_lowest"].meaning
    assert all(case.get("time") is None for case in suite.iter("testcase"))  # nobody measured it


def test_one_suite_per_bundle_and_sums_over_them(tmp_path: Path) -> None:
    root = written(
        tmp_path / "parity.xml",
        Suite("a", {None: make_report()}, 1.0),
        Suite("b", error="the disk ran full \x00 <b>"),
        Suite("c", unproven="run it there"),
    )
    assert [suite.get("name") for suite in root] == ["a", "b", "c"]
    assert (root.get("failures"), root.get("errors"), root.get("skipped"), root.get("time")) == ("2", "1", "1", "1.000")
    assert root.get("tests") == str(len(root.findall(".//testcase")))
    error = root.find("testsuite[@name='b']/testcase/error")
    assert error is not None
    assert error.get("message") == "the disk ran full  <b>"
