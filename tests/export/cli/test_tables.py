"""Rows at any width: a table where it fits, blocks where not; nothing that is copied is cut or broken."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from arriero.export.build_file.schema import BuildConfig
from arriero.export.calibration.coverage import RANGES
from arriero.export.cli.show_calibration import show_calibration
from arriero.export.cli.show_comparison import show_comparison
from arriero.export.cli.show_diagnosis import show_diagnosis
from arriero.export.cli.show_plan import show_plan
from arriero.export.cli.show_profiles import list_profiles, show_profile, show_rows
from arriero.export.cli.show_results import Outcome, show_outcome
from arriero.export.cli.tables import GAP, print_rows, print_wrapped
from arriero.export.machine.checks import Check
from arriero.export.machine.doctor import Diagnosis
from arriero.export.pipeline.planned import Plan, PlannedStage, PlannedTarget
from arriero.export.pipeline.results import Failure, TargetResult
from arriero.export.proof.compare import NOTES, Compared
from arriero.profiles.recipe import load_profile
from arriero.traits import reinstall

PATH = "/srv/models/" + "a-folder-with-a-long-name/" * 4 + "bundle"
COMMAND = reinstall("onnxruntime")
TWO = reinstall("tvm")
REMEDY = f"{COMMAND}; on a board it comes with the system (`apt-get install tvm`), and this one is older."


LINE = Compared(
    *("bundles/int4", "a-bundle-with-a-long-name", "onnxruntime", "/srv/profiles/int4.yaml"),
    *(1 << 30, 1 << 29, 4.5, "float32", 4096, 12.5, 0.01, 0.0012, 0.008, 0.2),
    *(0.2, 0.99, 0.98, 0.99, 0.985, (0.96, 0.99), 200),
)


def printed(show: Callable[[Console], None], width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    show(console)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def too_wide(text: str, width: int = 80) -> list[str]:
    """The lines beyond the width that could have been broken."""
    return [line for line in text.splitlines() if len(line) > width and " " in line.strip().partition("  ")[2].strip()]


def test_a_table_where_it_fits_and_blocks_where_not() -> None:
    rows = [("one", "12"), ("two", "x" * 30)]
    wide, narrow = (printed(lambda console: print_rows(console, ("a", "b"), rows), width) for width in (80, 20))
    assert [line.split() for line in wide.splitlines() if "\u2500" not in line] == [
        ["a", "b"],
        ["one", "12"],
        ["two", "x" * 30],
    ]
    assert narrow.splitlines() == ["one", "  b  12", "two", f"  b  {'x' * 30}"]


def test_what_is_copied_is_whole_at_any_width() -> None:
    command = f"run `arriero parity {PATH}` there"
    for width in (40, 80, 200):
        shown = printed(
            lambda console: print_rows(console, ("a", "b", "c"), [(PATH, f"{REMEDY} {TWO}", command)]), width
        )
        for whole in (PATH, f"{COMMAND};", TWO, "(`apt-get install tvm`),", f"`arriero parity {PATH}`"):
            assert whole in shown


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_a_table_is_shown_where_it_fits_whole_and_nowhere_else(count: int) -> None:
    heads, width = [str(number) for number in range(count)], 80
    for most in range(6, 30):
        row = [f"{number}".ljust(most, "x") + "!" for number in range(count)]
        text = printed(lambda console, row=row: print_rows(console, heads, [row]), width)  # type: ignore[misc]
        assert all(cell in text for cell in row)
        assert ("\u2500" in text) == (count * (most + 1) + GAP * (count - 1) <= width)


def plan() -> Plan:
    """That of a large model, as the widest that a table shows."""
    stages = ("calibrate", "kernels-x86_64", "lower-portable-fp32", "parity-portable-fp32+a-long-adapter")
    target = ("portable-fp32", "onnxruntime", "any", "fp32", 4096, 4, "float32", {"f32": 1 << 40, "bf16": 2 << 30})
    return Plan(
        model={
            "folder": PATH,
            "model_type": "llama4",
            "parameters": 401583781376,
            "tensors": 1061,
            "size": "0 B",
            "layers": {"chunked dense": 24, "global moe": 24},
            "experts": 128,
            "experts_per_token": 1,
            "chunk": 8192,
            "layout": "synthetic",
            "stored_as": {"bf16": 1061},
            "adapters": [],
        },
        reference={"answers": "forced", "record": "bundle", "record_bytes": 1 << 30},
        stages=tuple(PlannedStage(name, "47ccade7cc74", False, 13 << 30, 1, 1099999.0) for name in stages),
        targets=(PlannedTarget(*target, 3 << 40, 6 << 30, {}, False),),
        context_prices=({"context": "10M", "tokens": 1, "within_model": False, "float32": 1 << 40, "int8": 1 << 38},),
        **dict.fromkeys(("memory_available", "memory_budget", "gpu_budget", "disk_budget")),
        disk_available=1,
        warnings=(),
        problems=(),
    )


CALIBRATION = {
    "calibration": {"set": "embedded", "seed": 11, "sha256": "0" * 64, "samples": {"text": 200}},
    "planned_memory_bytes": None,
    "peak_memory_bytes": 1 << 34,
    "seconds": 1.0,
    "profiles": [],
    "layers": [
        {"layer": layer, "tokens_per_expert": [12, 1234, 123456], "largest_input": dict.fromkeys(RANGES, 123.456)}
        for layer in range(48)
    ],
}


def outcome() -> Outcome:
    """Of a build whose stages took long, one target of it failed."""
    targets = [
        {"name": "portable-fp32", "backend": "onnxruntime", "profile": "fp32"},
        {"name": "a-target-with-a-long-name", "backend": "onnxruntime", "profile": "int8"},
    ]
    config = BuildConfig.model_validate(
        {"version": 1, "model": "synthetic://scout", "modalities": ["text"], "targets": targets}
    )
    stages = {"graph": 21.5, "calibrate": 1099999.0, "lower-portable-fp32": 10200.0, "parity-portable-fp32": 122700.0}
    failure = Failure("router_agreement", "Router agreement", "97.61 %", "at least 99 %", "layer 3", "finer profile")
    done = TargetResult("portable-fp32", Path("out/portable-fp32"), "published", 1232921.5, stages)
    failed = TargetResult(
        *("a-target-with-a-long-name", Path("out/a"), "failed", 132900.0, {"lower-a": 10200.0}), failures=(failure,)
    )
    return Outcome("build.yaml", False, config, [done, failed])


@pytest.mark.parametrize(
    ("show", "words"),
    [
        (lambda console: show_plan(plan(), console), ["305 h 33 min", "parity-portable-fp32+a-long-adapter", "6 GiB"]),
        (lambda console: show_calibration(CALIBRATION, console), ["12/1,234/123,456", "123"]),
        (
            lambda console: show_outcome(outcome(), console, console),
            ["1232921.5 s", "Router agreement 97.61 %, limit at least 99 %", "parity 122700.0 s"],
        ),
    ],
    ids=["plan", "calibrate", "results"],
)
@pytest.mark.parametrize("width", [60, 80, 100])
def test_the_tables_of_commands_cut_nothing(show: Callable[[Console], None], words: list[str], width: int) -> None:
    text = printed(show, width)
    said = " ".join(text.split())
    for one in words:
        assert one in said
    assert "\u2026" not in text
    assert not too_wide(text, width), text


def test_a_comparison_says_what_its_figures_are() -> None:
    said = " ".join(printed(lambda console: show_comparison([LINE], console)).split())
    for note in NOTES:
        assert note in said
    for words in ("KL, nats", "float32, 4 KiB/token"):
        assert words in said


def test_texts_are_never_markup() -> None:
    odd = "[/x] [red]a[/red] [bold"
    assert odd in printed(lambda console: print_rows(console, ("a", "b"), [("1", odd)]))
    assert odd in printed(lambda console: print_wrapped(console, odd))


def test_a_column_of_nothing_is_left_out() -> None:
    assert "how" not in printed(lambda console: print_rows(console, ("a", "how"), [("1", ""), ("2", "")]))


@pytest.mark.parametrize("width", [80, 100])
def test_what_commands_show_at_80_columns(width: int) -> None:
    checks = (
        Check("python", "ok", "3.11.7", ("build",)),
        Check("onnxruntime", "missing", "1.31 and a long story of what was there before it", ("build",), REMEDY),
    )
    shows: list[Callable[[Console], None]] = [
        lambda console: show_diagnosis(Diagnosis(checks, {"onnxruntime": checks}), console),
        lambda console: show_comparison([LINE] * 4, console),
        lambda console: show_profile(load_profile("mixed"), console),
        lambda console: show_rows(list_profiles(), console),
    ]
    for show in shows:
        text = printed(show, width)
        assert not too_wide(text, width), text
        assert "\u2026" not in text
