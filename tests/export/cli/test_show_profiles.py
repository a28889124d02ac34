"""`arriero profiles`: list, show, explain, diff."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from arriero.errors import ArrieroError
from arriero.export.cli.app import app
from arriero.export.cli.show_profiles import diff, explain, list_profiles
from arriero.profiles.recipe import load_profile, shipped

EXPERT = "language_model.model.layers.3.feed_forward.experts.down_proj"
ROUTER = "language_model.model.layers.3.feed_forward.router.weight"


def run(*words: str) -> str:
    result = CliRunner().invoke(app, ["profiles", *words])
    assert result.exit_code == 0, result.output
    return result.output


def test_every_shipped_profile_is_listed() -> None:
    assert [one["name"] for one in list_profiles()] == list(shipped())
    assert {one["name"]: one["calibrates"] for one in json.loads(run("list", "--json"))}["int4"] is True


def test_show_gives_every_selector_its_reason() -> None:
    shown = json.loads(run("show", "int4", "--json"))
    assert all(one["reason"] for one in shown["keep"] + shown["rules"])
    assert "experts below 16 tokens" in run("show", "int4").replace("\n", " ")


def test_explain_names_selector_and_reason() -> None:
    explained = explain(load_profile("int4"), EXPERT)
    assert explained["stored"].startswith("int4 in blocks of")
    assert explained["stored"].endswith("gptq")
    assert explained["selector"] == "experts"
    assert explained["group"] == "experts: the routed experts, gate|up and down"
    assert "bytes" in explained["reason"]
    kept = json.loads(run("explain", "int4", ROUTER, "--json"))
    assert kept["stored"] == "exact"
    assert "which expert runs" in kept["reason"]
    assert "exact" in run("explain", "int4", ROUTER)
    with pytest.raises(ArrieroError, match="no selector of profile `int4` decides this tensor"):
        explain(load_profile("int4"), "model.nothing")


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("fp8", "fp8 (E4M3) per output channel, fp8 activations per token"),
        ("int8-dynamic", "int8 per output channel, int8 activations per token"),
        (
            "int8-static",
            "int8 per output channel, int8 activations at one calibrated scale, balanced by SmoothQuant 0.95",
        ),
        ("bf16", "bfloat16"),
    ],
)
def test_explain_tells_every_kind_of_scheme(name: str, stored: str) -> None:
    assert explain(load_profile(name), EXPERT)["stored"] == stored
    changed = {one["what"]: one for one in diff(load_profile("int8"), load_profile(name))}
    assert any(stored in (one["right"] or "") for one in changed.values())


def test_diff_shows_what_differs_and_nothing_else() -> None:
    assert diff(load_profile("int8"), load_profile("int8")) == []
    found = {one["what"]: one for one in json.loads(run("diff", "int4", "int4-b128", "--json"))}
    assert not any("router" in what for what in found)
    changed = next(one for what, one in found.items() if what == "attention")
    assert "blocks of 32" in changed["left"]
    assert "blocks of 128" in changed["right"]
    only = {one["what"]: one for one in diff(load_profile("int8"), load_profile("int4"))}
    assert only["calibration.minimum_tokens"] == {"what": "calibration.minimum_tokens", "left": None, "right": "16"}
    assert "no difference" in run("diff", "int8", "int8")
