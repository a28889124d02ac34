"""Parity reports as JUnit XML: one suite per bundle, one test case per judged row.

A suite has the time that its bundle took, a test case none: all rows come of the same passes over the cases.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from arriero.runtimes.proof.pages import clean, show, show_limit
from arriero.runtimes.proof.report import ParityReport, write_text

NAME = "arriero.parity"


@dataclass(frozen=True)
class Suite:
    """One bundle: its reports, of the model, None, and of it with each adapter; seconds that all of it took.

    `error`: why there is no report, or none that counts; `unproven`: the device that has to make it. `causes`: why rows
    failed and what to do, by the key of `reports` and the metric, where somebody knows.
    """

    name: str
    reports: Mapping[str | None, ParityReport] = field(default_factory=dict)
    seconds: float = 0.0
    causes: Mapping[tuple[str | None, str], str] = field(default_factory=dict)
    error: str | None = None
    unproven: str | None = None


def write_junit(suites: Sequence[Suite], path: Path) -> None:
    """Write one test suite per bundle; a bundle that was not built or proven has one case that says so."""
    root = ET.Element("testsuites", name="arriero")
    root.extend(_suite(suite) for suite in suites)
    for count in ("tests", "failures", "errors", "skipped"):
        root.set(count, str(sum(int(suite.get(count, "0")) for suite in root)))
    root.set("time", f"{sum(suite.seconds for suite in suites):.3f}")
    ET.indent(root)
    write_text(path, '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n")


def _suite(suite: Suite) -> ET.Element:
    element = ET.Element("testsuite", name=clean(suite.name), time=f"{suite.seconds:.3f}")
    if labels := {key: value for report in suite.reports.values() for key, value in report.labels.items()}:
        properties = ET.SubElement(element, "properties")
        for key, value in labels.items():
            ET.SubElement(properties, "property", name=clean(key), value=clean(value))
    judged = [
        (adapter, row) for adapter, report in suite.reports.items() for row in report.rows if row.status != "info"
    ]
    for adapter, row in judged:
        name = row.metric if adapter is None else f"{row.metric} with {adapter}"
        case = ET.SubElement(element, "testcase", classname=clean(suite.name), name=clean(name))
        limit = show_limit(row)
        sentence = clean(f"{row.title}: {show(row)}{limit and f', {limit}'}. {row.detail}".rstrip(" ."))
        if row.status == "fail":
            why = suite.causes.get((adapter, row.metric), row.about.meaning)
            ET.SubElement(case, "failure", type="BelowThreshold", message=sentence).text = clean(why)
        else:
            ET.SubElement(case, "system-out").text = sentence
    for kind, message in (("error", suite.error), ("skipped", suite.unproven)):
        if message is not None:
            case = ET.SubElement(element, "testcase", classname=clean(suite.name), name="build")
            ET.SubElement(case, kind, message=clean(message))
    if warnings := dict.fromkeys(warning for report in suite.reports.values() for warning in report.warnings):
        ET.SubElement(element, "system-err").text = clean("\n".join(warnings))
    element.set("tests", str(len(element.findall("testcase"))))
    element.set("failures", str(sum(row.status == "fail" for _, row in judged)))
    element.set("errors", str(int(suite.error is not None)))
    element.set("skipped", str(int(suite.unproven is not None)))
    return element
