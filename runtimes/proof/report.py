"""The parity report as data, and its four forms: JSON, JUnit XML, one self-contained HTML page, a terminal table.

Files appear whole or not at all. Numbers that are not finite survive the round trip through JSON.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arriero.errors import ArrieroError
from arriero.runtimes.proof import metrics, plots
from arriero.thresholds import METRICS, Metric

if TYPE_CHECKING:
    from jinja2 import Template
    from rich.console import Console

FORMAT = 1
_AGAIN = "Run `arriero parity` again"
_LAYER_NUMBERS = ("relative_l2", "snr_db", "router_agreement")
_CASE_NUMBERS = ("logits_relative_l2", "logits_max_abs_error", "kl_mean", "greedy_prefix")


@dataclass(frozen=True)
class Row:
    """One line of the report. `value` None: not measured, `detail` says why; `status`: pass, fail or info."""

    metric: str
    value: float | None
    threshold: float | None
    status: str
    detail: str

    def __post_init__(self) -> None:
        if self.metric.partition(".")[0] not in METRICS:
            raise ValueError(f"no such parity metric: {self.metric}")

    @property
    def about(self) -> Metric:
        """The metric's meaning; `task_accuracy_drop.recall` shares that of `task_accuracy_drop`."""
        return METRICS[self.metric.partition(".")[0]]

    @property
    def title(self) -> str:
        """The metric's title, with the family if the row is of one."""
        family = self.metric.partition(".")[2]
        return f"{self.about.title}: {family}" if family else self.about.title


@dataclass(frozen=True)
class LayerSeries:
    """One decoder layer: error of the residual stream after it, and its router's agreement (None: dense)."""

    layer: int
    attention: str
    ffn: str
    relative_l2: float | None
    snr_db: float | None
    router_agreement: float | None
    near_ties: int
    near_tie_flips: int
    real_flips: int


@dataclass(frozen=True)
class FamilyScore:
    """Task scores of one family. `lost`: right on the reference only; `gained`: right on the candidate only."""

    family: str
    count: int
    reference_right: int
    candidate_right: int
    lost: int
    gained: int


@dataclass(frozen=True)
class CaseResult:
    """One case: teacher-forced figures and both greedy answers. `right` is None where the case has no score."""

    name: str
    family: str
    tokens: int
    image_tiles: int
    logits_relative_l2: float
    logits_max_abs_error: float
    kl_mean: float
    token_flips: int
    router_flips: int | None
    greedy_prefix: float
    expected: str
    reference_text: str
    candidate_text: str
    reference_right: bool | None
    candidate_right: bool | None


@dataclass(frozen=True)
class ParityReport:
    """All rows, the per-layer series, the families and the cases. `labels` are the caller's (bundle, profile, ...)."""

    rows: tuple[Row, ...]
    layers: tuple[LayerSeries, ...]
    families: tuple[FamilyScore, ...]
    cases: tuple[CaseResult, ...]
    near_tie: float
    labels: dict[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> tuple[Row, ...]:
        """The rows that failed; empty, hence false, when the candidate passed."""
        return tuple(row for row in self.rows if row.status == "fail")

    def to_dict(self) -> dict[str, Any]:
        """The report as strict JSON values; infinities and NaN become the strings "inf", "-inf" and "nan"."""
        return {"format": FORMAT, "passed": not self.failed, **_plain(asdict(self))}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str | None = None) -> ParityReport:
        """The report that `to_dict` wrote. Raises ArrieroError, naming `where`, when `data` is not one."""
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, Mapping) else type(data).__name__
            what = f"not a parity report of format {FORMAT} (found {found!r})"
            raise ArrieroError(what, where=where, remedy=_AGAIN)
        try:
            return cls(
                rows=tuple(Row(**_numbers(row, "value", "threshold")) for row in data["rows"]),
                layers=tuple(LayerSeries(**_numbers(layer, *_LAYER_NUMBERS)) for layer in data["layers"]),
                families=tuple(FamilyScore(**family) for family in data["families"]),
                cases=tuple(CaseResult(**_numbers(case, *_CASE_NUMBERS)) for case in data["cases"]),
                near_tie=float(data["near_tie"]),
                labels=dict(data["labels"]),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ArrieroError(f"the parity report is damaged ({error})", where=where, remedy=_AGAIN) from error


def judge(metric: str, value: float | None, threshold: float | None, detail: str) -> Row:
    """The row of `metric`: with a threshold, what was not measured fails; without one, only broken numbers fail."""
    direction = METRICS[metric.partition(".")[0]].direction
    if value is None:
        return Row(metric, None, threshold, "info" if threshold is None else "fail", f"not measured: {detail}")
    if threshold is not None:
        return Row(metric, value, threshold, "pass" if metrics.meets(value, threshold, direction) else "fail", detail)
    anything = math.inf if direction == "max" else -math.inf
    return Row(metric, value, None, "info" if metrics.meets(value, anything, direction) else "fail", detail)


def write_json(report: ParityReport, path: Path) -> None:
    """Write the report as JSON, indented, keys in a fixed order; the same report gives the same bytes."""
    _write(path, json.dumps(report.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> ParityReport:
    """Read what `write_json` wrote. Raises ArrieroError when the file is missing or is no parity report."""
    try:
        return ParityReport.from_dict(json.loads(path.read_text(encoding="utf-8")), str(path))
    except OSError as error:
        raise ArrieroError("the parity report cannot be read", where=str(path), remedy=_AGAIN) from error
    except ValueError as error:
        raise ArrieroError(f"not valid JSON ({error})", where=str(path), remedy=_AGAIN) from error


def write_junit(report: ParityReport, path: Path, name: str = "arriero.parity") -> None:
    """Write JUnit XML: one suite `name`, one test case per row; rows without a threshold pass, with their value."""
    suite = ET.Element(
        "testsuite",
        name=name,
        tests=str(len(report.rows)),
        failures=str(len(report.failed)),
        errors="0",
        skipped=str(sum(row.status == "info" and row.value is None for row in report.rows)),
    )
    if report.labels:
        properties = ET.SubElement(suite, "properties")
        for key, value in report.labels.items():
            ET.SubElement(properties, "property", name=key, value=_clean(value))
    for row in report.rows:
        case = ET.SubElement(suite, "testcase", classname=name, name=_clean(row.metric))
        told = _clean(f"{row.title}: {show(row)}{_limit(row)}. {row.detail}".rstrip(" ."))
        if row.status == "fail":
            ET.SubElement(case, "failure", type="BelowThreshold", message=told).text = _clean(row.about.meaning)
        elif row.value is None:
            ET.SubElement(case, "skipped", message=told)
        else:
            ET.SubElement(case, "system-out").text = told
    root = ET.Element("testsuites", tests=suite.get("tests", ""), failures=suite.get("failures", ""))
    root.append(suite)
    ET.indent(root)
    _write(path, '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n")


def write_html(report: ParityReport, path: Path) -> None:
    """Write one HTML page with tables and inline SVG plots; it needs no other file, no network and no script."""
    _write(path, render_html(report))


def render_html(report: ParityReport) -> str:
    """The HTML page as text."""
    order = {"fail": 0, "pass": 1, "info": 2}
    page = _template("parity.html.jinja").render(
        report=report,
        rows=sorted(_told(report), key=lambda row: order[row.status]),  # stable: the report's order within a status
        counts={status: sum(row.status == status for row in report.rows) for status in order},
        cases=sorted(report.cases, key=_badness, reverse=True),
        shown=show,
        limit=lambda row: _limit(row).removeprefix(", "),
        number=_number,
        plots=[plot for plot in _plots(report) if plot],
    )
    return _clean(page)


def write_page(
    path: Path,
    title: str,
    labels: Mapping[str, str],
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    notes: Sequence[str],
    plots: Sequence[plots.Plot],
) -> None:
    """Write one HTML page of the same kind with one table, `notes` under it and `plots`."""
    values = {"title": title, "labels": labels, "heads": heads, "rows": rows, "notes": notes, "plots": plots}
    _write(path, _clean(_template("page.html.jinja").render(values)))


def render_table(report: ParityReport, console: Console) -> None:
    """Print the rows as a table, failures last, where the eye ends, then one line that says whether it passed."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    marks = {
        "pass": Text("pass", "green"),
        "fail": Text("FAIL", "bold red"),
        "info": Text("info", "dim"),
    }
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    table.add_column("metric")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("threshold", justify="right", no_wrap=True)
    table.add_column("status")
    table.add_column("detail", overflow="fold", style="dim")
    for row in sorted(_told(report), key=lambda row: row.status == "fail"):
        limit = _limit(row).removeprefix(", ")
        table.add_row(Text(row.title), show(row), limit, marks[row.status], Text(row.detail))
    console.print(table)
    judged = sum(row.status != "info" for row in report.rows)
    if report.failed:
        console.print(Text(f"{len(report.failed)} of {judged} judged rows failed", "bold red"))
    else:
        console.print(Text(f"all {judged} judged rows passed", "bold green"))


def show(row: Row) -> str:
    """The row's value with its unit: shares as percent, small numbers in scientific form; a dash if not measured."""
    return _number(row.value, row.about.unit)


def _limit(row: Row) -> str:
    if row.threshold is None:
        return ""
    unit = row.about.unit
    limit = f"{100 * row.threshold:.6g} %" if unit == "share" else _number(row.threshold, unit)
    return f", {'at most' if row.about.direction == 'max' else 'at least'} {limit}"


def _number(value: float | None, unit: str = "") -> str:
    if value is None:
        return "–"
    if not math.isfinite(value):
        return {"inf": "∞", "-inf": "−∞"}.get(str(value), "not a number")
    if unit == "share":
        text = f"{100 * value:.2f}"
        # 99.999 % must not be read as 100 %
        return f"{'> 99.99' if text == '100.00' and value < 1 else text} %"
    if unit == "count":
        return f"{value:,.0f}"
    if unit == "dB":
        return f"{value:.1f} dB"
    return f"{value:.3g} {unit}".rstrip()


def _told(report: ParityReport) -> list[Row]:
    """The rows for human eyes: a family's drop tells both accuracies, so these two are left out where not judged."""
    both = ("task_accuracy_reference.", "task_accuracy_candidate.")
    return [row for row in report.rows if row.status != "info" or not row.metric.startswith(both)]


def _badness(case: CaseResult) -> tuple[bool, float]:
    error = case.logits_relative_l2
    return case.candidate_right is not case.reference_right, math.inf if math.isnan(error) else error


def _plots(report: ParityReport) -> list[plots.Plot | None]:
    limits = {row.metric: row.threshold for row in report.rows}
    kinds = {layer.layer: f"{layer.attention}, {layer.ffn}" for layer in report.layers}
    return [
        plots.error_bars(
            {layer.layer: layer.relative_l2 for layer in report.layers if layer.relative_l2 is not None},
            kinds,
            limits.get("layer_relative_l2_highest"),
        ),
        plots.agreement_bars(
            {layer.layer: layer.router_agreement for layer in report.layers if layer.router_agreement is not None},
            {
                layer.layer: f"{layer.real_flips} flips, {layer.near_tie_flips} near-tie flips apart"
                for layer in report.layers
            },
            limits.get("router_agreement_lowest"),
        ),
        plots.family_bars(
            {score.family: (score.reference_right, score.candidate_right, score.count) for score in report.families}
        ),
    ]


@cache
def _template(name: str) -> Template:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # the path is not what is wrong
            raise
        raise ArrieroError(
            f"the report cannot be written ({error.strerror})",
            where=str(path),
            remedy="Give a path that can be written",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _clean(text: str) -> str:
    """`text` without the control characters that neither XML 1.0 nor HTML can hold."""
    return "".join(c for c in text if c in "\t\n\r" or (c >= " " and not "\ud800" <= c <= "\udfff" and c < "\ufffe"))


def _plain(value: Any) -> Any:
    """`value` with tuples as lists, and floats that JSON cannot hold as strings."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _numbers(data: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {key: float(item) if key in names and item is not None else item for key, item in data.items()}
