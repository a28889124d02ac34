"""The forms of a parity report: each parses, says what failed, and stands alone."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from arriero.errors import ArrieroError
from arriero.runtimes.manifest import Fallback
from arriero.runtimes.proof import plots, svg
from arriero.runtimes.proof.heat_map import coverage_map
from arriero.runtimes.proof.junit import Suite, write_junit
from arriero.runtimes.proof.pages import render_html, show, write_html
from arriero.runtimes.proof.report import (
    CaseResult,
    FamilyScore,
    LayerSeries,
    ParityReport,
    read_json,
    write_json,
    write_text,
)
from arriero.runtimes.proof.rows import judge
from arriero.thresholds import METRICS

HOSTILE = "<script>alert('x')</script> & \x00\x1b"


def make_report(layers: int = 8) -> ParityReport:
    """A report with every kind of row, layers of both kinds, and hostile text wherever text comes from a model."""
    series = tuple(
        LayerSeries(
            layer=n,
            attention="global" if n % 4 == 3 else "chunked",
            ffn="moe" if n % 2 else "dense",
            relative_l2=[0.0, math.nan][n == 2] if n in (0, 2) else 3e-4 * 1.7**n,
            snr_db=math.inf if n == 0 else 70.0 - 4.6 * n,
            router_agreement=1.0 - 0.0007 * n if n % 2 else None,
            near_ties=3 if n % 2 else 0,
            near_tie_flips=1 if n % 2 else 0,
            real_flips=n if n % 2 else 0,
        )
        for n in range(layers)
    )
    cases = tuple(
        CaseResult(
            name=f"recall-{n}",
            family="recall",
            tokens=212 + n,
            image_tiles=n % 2,
            logits_relative_l2=0.004 * (n + 1),
            logits_max_abs_error=0.02,
            kl_mean=2e-5,
            token_flips=n,
            router_flips=None if n == 2 else n,
            greedy_prefix=1.0 if n else 0.4,
            expected="blue",
            reference_text="blue",
            candidate_text=HOSTILE if n == 0 else "blue",
            reference_right=True,
            candidate_right=n > 0,
        )
        for n in range(3)
    )
    rows = (
        judge("nonfinite_values", 0.0, 0.0, ""),
        judge("logits_max_abs_error", 0.021, None, "worst case recall-0"),
        judge("router_agreement", 0.99913, 0.999, "4 layers: 5 of 5760 clear choices differ; apart: 3 of 12 near ties"),
        judge("router_agreement_lowest", 0.9951, 0.998, f"layer 7 {HOSTILE}"),
        judge("layer_snr_db_lowest", 37.8, None, "layer 7"),
        judge("vision_relative_l2", None, 0.01, "no image cases"),
        judge("embeddings_relative_l2", None, None, "no cases"),
        judge("task_accuracy_drop.recall", 0.02, None, "1 lost, 0 gained of 48"),
    )
    families = (FamilyScore("recall", 48, 47, 46, 1, 0), FamilyScore("video direction of motion", 40, 40, 40, 0, 0))
    return ParityReport(
        *(rows, series, families, cases, 1e-3, "generated"),
        {"bundle": "portable-int8", "profile": "int8 (version 1)", "measured": "2026-11-26 04:00 UTC"},
        coverage={n: tuple(7 * expert**2 for expert in range(16)) for n in range(1, layers, 2)},
        fallback=(Fallback(1, 0, 0, "nearest"), Fallback(3, 1, 7, "nearest")),
    )


def test_json_round_trip_is_whole_and_repeatable(tmp_path):
    report = make_report()
    write_json(report, tmp_path / "parity.json")
    first = (tmp_path / "parity.json").read_bytes()
    write_json(report, tmp_path / "parity.json")
    assert (tmp_path / "parity.json").read_bytes() == first
    assert repr(read_json(tmp_path / "parity.json")) == repr(report)
    assert json.loads(first, parse_constant=pytest.fail)["passed"] is False
    assert os.listdir(tmp_path) == ["parity.json"]


@pytest.mark.parametrize(
    ("number", "kind", "told"),
    [
        (errno.ENOSPC, OSError, "No space left"),
        (errno.EROFS, ArrieroError, r"cannot be written \(Read-only"),
        (errno.ENOENT, ArrieroError, "a path that can be written"),
    ],
)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, number, kind, told):
    (tmp_path / "parity.json").write_text("old")
    failure = OSError(number, os.strerror(number))
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(failure))
    with pytest.raises(kind, match=told):
        write_json(make_report(), tmp_path / "parity.json")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("parity.json", "old")]


def test_a_report_goes_through_links_and_into_what_is_no_file(tmp_path):
    """A link stays a link, and a pipe or a device is written to, never replaced."""
    (tmp_path / "there").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "there" / "real.json")
    write_json(make_report(), tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink()
    assert read_json(tmp_path / "there" / "real.json").labels == make_report().labels
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_text(tmp_path / "pipe", "all of it")
    assert os.read(reader, 100) == b"all of it"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("text", [None, "{", "[]", '{"format": 2}', '{"format": 9}', "\x00"])
def test_a_damaged_report_is_refused_with_its_path(tmp_path, text):
    if text is not None:
        (tmp_path / "parity.json").write_text(text)
    with pytest.raises(ArrieroError, match="Run `arriero parity` again") as caught:
        read_json(tmp_path / "parity.json")
    assert "parity.json" in str(caught.value)


class Tags(HTMLParser):
    """Collects tags with their attributes, and checks that they nest."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_nests(tmp_path):
    write_html(make_report(), tmp_path / "parity.html")
    page = (tmp_path / "parity.html").read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(page)
    assert not tags.open
    names = {name for name, _ in tags.seen}
    assert not names & {"script", "link", "img", "iframe", "object", "image", "use"}
    attributes = {key for _, attributes in tags.seen for key in attributes}
    assert not attributes & {"src", "href", "xlink:href", "srcset", "onclick", "onload"}
    assert not re.search(r"https?:|//|url\(|@import", page)


def test_the_page_tells_what_failed_and_escapes_what_a_model_wrote():
    page = render_html(make_report())
    assert "2 of 4 judged rows failed" in page
    assert "&lt;script&gt;alert" in page
    assert page.index("Router agreement, lowest layer") < page.index("Values not finite"), "failures come first"
    assert "portable-int8" in page
    assert page.count("<svg") == 4


def test_the_page_of_a_passing_report_without_layers_families_or_labels():
    bare = {"layers": (), "families": (), "labels": {}, "coverage": {}}
    report = replace(make_report(), rows=(judge("nonfinite_values", 0.0, 0.0, ""),), **bare)
    page = render_html(report)
    assert "all 1 judged rows passed" in page
    assert "<svg" not in page


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("router_agreement", 1.0, "100.00 %"),
        ("router_agreement", 0.999999, "> 99.99 %"),
        ("layer_snr_db_lowest", math.inf, "∞"),
        ("layer_snr_db_lowest", 41.26, "41.3 dB"),
        ("logits_kl_mean", 2.5e-6, "2.5e-06 nat"),
        ("logits_max_abs_error", math.nan, "not a number"),
        ("nonfinite_values", 1234.0, "1,234"),
        ("vision_relative_l2", None, "–"),
    ],
)
def test_numbers_read_well(metric, value, text):
    assert show(judge(metric, value, None, "")) == text


@pytest.mark.parametrize(
    ("value", "threshold", "status"),
    [
        (None, None, "info"),
        (None, 0.9, "fail"),
        (math.nan, None, "fail"),
        (math.nan, 0.0, "fail"),
        (0.95, 0.9, "pass"),
        (0.85, 0.9, "fail"),
        (0.1, None, "info"),
    ],
)
def test_judge(value, threshold, status):
    assert judge("router_agreement", value, threshold, "").status == status


def test_every_metric_says_what_it_is():
    for metric in METRICS.values():
        assert metric.direction in ("min", "max")
        assert metric.unit in ("", "share", "count", "nat", "dB")
        assert metric.meaning.endswith(".")


@pytest.mark.parametrize(
    "errors",
    [{0: 0.0}, {0: math.nan}, {0: math.inf}, {0: 1e-7, 1: 1e3}, {n: 10.0 ** (n - 30) for n in range(48)}],
)
@pytest.mark.parametrize("limit", [None, 0.0, 1e-3])
def test_error_bars_stay_inside_the_picture(errors, limit):
    drawn = ET.fromstring(plots.error_bars(errors, dict.fromkeys(errors, "chunked, moe"), limit).svg)
    bottom = svg.TOP + svg.DEEP
    for bar in drawn.iter("rect"):
        top, height = float(bar.get("y")), float(bar.get("height"))
        assert svg.TOP - 0.1 <= top <= top + height <= bottom + 0.1
        assert 0 <= float(bar.get("x")) <= float(bar.get("x")) + float(bar.get("width")) <= svg.WIDTH
    for line in drawn.iter("line"):
        assert svg.TOP - 0.1 <= float(line.get("y1")) <= bottom + 0.1
    broken = [value for value in errors.values() if not math.isfinite(value)]
    assert sum(bar.get("class") == "bad" for bar in drawn.iter("rect")) == len(broken)


@pytest.mark.parametrize("shares", [{0: 1.0}, {1: 0.0, 3: 1.0}, {0: math.nan}, {n: 1 - n / 1e4 for n in range(48)}])
@pytest.mark.parametrize("limit", [None, 0.99, 1.0])
def test_agreement_dots_stay_inside_the_picture(shares, limit):
    drawn = ET.fromstring(plots.agreement_bars(shares, {}, limit).svg)
    dots = list(drawn.iter("circle"))
    assert len(dots) == len(shares)
    for dot in dots:
        assert svg.TOP <= float(dot.get("cy")) <= svg.TOP + svg.DEEP + 0.1


def test_no_data_gives_no_plot():
    assert plots.error_bars({}, {}, None) is None
    assert plots.agreement_bars({}, {}, 0.9) is None
    assert plots.family_bars({}) is None
    assert coverage_map({}, ()) is None


@pytest.mark.parametrize(("layers", "experts"), [(4, 16), (24, 128), (48, 16)])
def test_every_expert_is_a_cell_of_the_heat_map(layers, experts):
    counts = {layer: [expert * 40 for expert in range(experts)] for layer in range(layers)}
    thin = {(layer, expert) for layer in range(layers) for expert in range(2)}
    plot = coverage_map(counts, thin)
    cells = list(ET.fromstring(plot.svg).iter("rect"))
    assert len(cells) == layers * experts
    assert sum(cell.get("class") == "bad" for cell in cells) == len(thin)
    assert ("bad", f"too few: {len(thin)} of {layers * experts:,} rounded without") in plot.legend
    assert cells[3].find("title").text == "layer 0, expert 3: 120 tokens"
    for cell in cells:
        assert 0 < float(cell.get("x")) <= float(cell.get("x")) + float(cell.get("width")) <= svg.WIDTH
        assert float(cell.get("height")) > 0


def test_both_axes_of_every_plot_have_titles():
    series = make_report().layers
    drawn = (
        plots.error_bars(dict.fromkeys(range(4), 0.001), {}, None),
        plots.agreement_bars({layer.layer: 0.9 for layer in series}, {}, None),
        plots.family_bars({"recall": (47, 46, 48)}),
        plots.size_and_error({"one": (9.0, 0.02)}),
        coverage_map({0: [1, 2]}, ()),
    )
    for plot in drawn:
        texts = list(ET.fromstring(plot.svg).iter("text"))
        assert sum("rotate" in text.get("transform", "") for text in texts) == 1, plot.title
        lowest = max(texts, key=lambda text: float(text.get("y")))
        assert lowest.text.strip("0123456789.,%e- ") != "", plot.title


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 33.0, [0, 10, 20, 30, 40]),
        (0.0, 9.6, [0, 2, 4, 6, 8, 10]),
        (0.9712, 1.0, [0.97, 0.98, 0.99, 1.0]),
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.0, 61000.0, [0, 20000, 40000, 60000, 80000]),
        (5.0, 5.0, None),
    ],
)
def test_ticks_are_round_and_cover_the_axis(low, high, ticks):
    drawn = svg.round_ticks(low, high)
    assert drawn[0] <= low + 1e-9
    assert drawn[-1] >= high - 1e-9
    assert ticks is None or drawn == pytest.approx(ticks)


def test_intervals_are_drawn_at_a_hundred_percent_too():
    plot = plots.family_bars({"recall": (20, 20, 20)})
    lines = [line for line in ET.fromstring(plot.svg).iter("line") if line.get("class") == "error"]
    widths = [float(line.get("x2")) - float(line.get("x1")) for line in lines[::3]]
    assert min(widths) > 30  # 83.9 to 100 %
    assert "Wilson" in plot.caption


def scored(right: int, count: int) -> ParityReport:
    report = make_report()
    family = FamilyScore("recall", count, right, right, 0, 0)
    return replace(report, families=(family,), rows=tuple(row for row in report.rows if row.status != "fail"))


def test_a_reference_that_answers_hardly_anything_right_is_said_in_every_form(tmp_path):
    """Two sides that share a fault agree: 0 of 8 right on both would otherwise pass without a word."""
    assert scored(2, 8).warnings == ()
    assert replace(make_report(), families=()).warnings == ()
    broken = scored(0, 8)
    (told,) = broken.warnings
    assert told.startswith("The reference itself answers 0 of 8 cases right")
    assert "a threshold on task_accuracy_reference makes" in told
    assert "task_accuracy_forced_reference" in replace(broken, answers="forced").warnings[0]
    assert broken.to_dict()["warnings"] == [told]
    write_json(broken, tmp_path / "parity.json")
    assert read_json(tmp_path / "parity.json").warnings == (told,)
    assert "Warning.</strong> The reference itself answers 0 of 8" in render_html(broken)
    write_junit([Suite("int8", {None: broken})], tmp_path / "parity.xml")
    assert ET.parse(tmp_path / "parity.xml").find("testsuite/system-err").text == told


def test_a_threshold_on_the_references_own_accuracy_fails_a_proof_without_a_floor():
    row = judge("task_accuracy_reference", 0.0, 0.5, "")
    assert row.status == "fail"
