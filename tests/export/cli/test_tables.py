"""Rows at any width: a table where it fits, blocks where not; nothing that is copied is cut or broken."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from rich.console import Console

from arriero.export.cli.show_comparison import show_comparison
from arriero.export.cli.show_diagnosis import show_diagnosis
from arriero.export.cli.show_profiles import list_profiles, show_profile, show_rows
from arriero.export.cli.tables import print_rows, print_wrapped
from arriero.export.machine.checks import Check
from arriero.export.machine.doctor import Diagnosis
from arriero.export.proof.compare import Compared
from arriero.profiles.recipe import load_profile

PATH = "/srv/models/" + "a-folder-with-a-long-name/" * 4 + "bundle"
REMEDY = "pip install --force-reinstall 'arriero[onnxruntime]' (it needs onnxruntime 1.32 or newer, and this is older)"


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
        shown = printed(lambda console: print_rows(console, ("a", "b", "c"), [(PATH, REMEDY, command)]), width)
        for whole in (PATH, "pip install --force-reinstall 'arriero[onnxruntime]'", f"`arriero parity {PATH}`"):
            assert whole in shown


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
    line = Compared(
        *("bundles/int4", "a-bundle-with-a-long-name", "onnxruntime", "/srv/profiles/int4.yaml"),
        *(1 << 30, 1 << 29, 4.5, "float32", 4096, 12.5, 0.01, 0.0012, 0.2, 0.99, 0.98, 0.99, 0.985, (0.96, 0.99), 200),
    )
    shows: list[Callable[[Console], None]] = [
        lambda console: show_diagnosis(Diagnosis(checks, {"onnxruntime": checks}), console),
        lambda console: show_comparison([line] * 4, console),
        lambda console: show_profile(load_profile("mixed"), console),
        lambda console: show_rows(list_profiles(), console),
    ]
    for show in shows:
        text = printed(show, width)
        assert not too_wide(text, width), text
        assert "\u2026" not in text
