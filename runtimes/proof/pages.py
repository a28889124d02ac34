"""The parity report for people: one self-contained HTML page, and its numbers as people read them.

What is only shown stands here, apart from what is measured: no stage of a build depends on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from arriero.runtimes.proof import plots
from arriero.runtimes.proof.heat_map import coverage_map
from arriero.runtimes.proof.report import CaseResult, ParityReport, write_text
from arriero.runtimes.proof.rows import Row
from arriero.runtimes.proof.svg import Plot

if TYPE_CHECKING:
    from jinja2 import Template

SIDES = ("reference", "candidate")
SIDE_BY_SIDE = 6  # columns beyond which a page begins another table: more have no room for a number


def write_html(report: ParityReport, path: Path) -> None:
    """Write one HTML page with tables and inline SVG plots; it needs no other file, no network and no script."""
    write_text(path, render_html(report))


def render_html(report: ParityReport, notes: Sequence[str] = ()) -> str:
    """The HTML page as text; `notes` say why rows failed, where somebody knows."""
    order = {"fail": 0, "pass": 1, "info": 2}
    page = _template("parity.html.jinja").render(
        report=report,
        notes=notes,
        rows=sorted(shown_rows(report), key=lambda row: order[row.status]),  # stable: in the report's order
        counts={status: sum(row.status == status for row in report.rows) for status in order},
        cases=sorted(report.cases, key=_badness, reverse=True),
        shown=show,
        limit=show_limit,
        number=_number,
        layer_limits={row.metric: show_limit(row) for row in report.rows},
        plots=[plot for plot in _plots(report) if plot],
    )
    return clean(page)


def write_page(
    path: Path,
    title: str,
    labels: Mapping[str, str],
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    notes: Sequence[str],
    pictures: Sequence[Plot],
) -> None:
    """Write one HTML page of the same kind: each of `rows` as a column, `notes` under them and `pictures`."""
    values = {"title": title, "labels": labels, "heads": heads, "rows": rows, "notes": notes, "plots": pictures}
    write_text(path, clean(_template("page.html.jinja").render(values, most=SIDE_BY_SIDE)))


def show(row: Row) -> str:
    """The row's value with its unit and standard error: shares as percent, small numbers in scientific form; a dash if
    not measured.
    """
    value = _number(row.value, row.about.unit)
    return f"{value} ± {_number(row.error, row.about.unit)}" if row.value is not None and row.error else value


def show_limit(row: Row) -> str:
    """The row's threshold with its direction, as in `at most 1 %`; empty without one."""
    if row.threshold is None:
        return ""
    unit = row.about.unit
    limit = f"{100 * row.threshold:.6g} %" if unit == "share" else _number(row.threshold, unit)
    return f"{'at most' if row.about.direction == 'max' else 'at least'} {limit}"


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


def shown_rows(report: ParityReport) -> list[Row]:
    """The rows for human eyes: a family's drop tells both accuracies, so these two are left out where not judged."""
    both = [f"{prefix}_{side}." for prefix in ("task_accuracy", "task_accuracy_forced") for side in SIDES]
    return [row for row in report.rows if row.status != "info" or not row.metric.startswith(tuple(both))]


def _badness(case: CaseResult) -> tuple[bool, float]:
    error = case.logits_relative_l2
    return case.candidate_right is not case.reference_right, math.inf if math.isnan(error) else error


def _plots(report: ParityReport) -> list[Plot | None]:
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
        coverage_map(report.coverage, {(expert.layer, expert.expert) for expert in report.fallback}),
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


def clean(text: str) -> str:
    """The text without the control characters that neither XML 1.0 nor HTML can hold."""
    return "".join(c for c in text if c in "\t\n\r" or (c >= " " and not "\ud800" <= c <= "\udfff" and c < "\ufffe"))
