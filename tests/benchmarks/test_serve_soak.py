"""A short run of the server's soak; the long one is `python benchmarks/serve_soak.py`."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llguidance", reason="needs llguidance: pip install 'arriero[structured]'")

SOAK = Path(__file__).parents[2] / "benchmarks" / "serve_soak.py"


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(SOAK.parent)
    return importlib.import_module("serve_soak")


def test_clients_of_every_kind_get_what_they_get_alone(tvm_workshop: Path, tmp_path: Path) -> None:
    command = [sys.executable, SOAK, tvm_workshop / "bundles" / "fp32", "--minutes", "0.3", "--clients", "3"]
    command += ["--requests", "6", "--prefix-cache", "0", "--log", tmp_path / "log"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 requests answered alone" in (tmp_path / "log").read_text()
    assert "0 faults, 0 of 3 grew" in done.stdout


def test_what_differs_and_what_grows(soak: Any) -> None:
    one = {"text": "a", "logprobs": [{"token": "a", "logprob": -1.0}]}
    near = {"text": "a", "logprobs": [{"token": "a", "logprob": -1.00001}]}
    assert soak.same(one, one, 0.0)
    assert soak.same(one, near, soak.TOLERANCE)
    assert not soak.same(one, near, 0.0)
    assert not soak.same(one, {**one, "text": "b"}, soak.TOLERANCE)
    assert not soak.same(one, {**one, "logprobs": []}, soak.TOLERANCE)
    early = dict.fromkeys(soak.LIMITS, 10.0)
    for name, limit in soak.LIMITS.items():
        assert soak.grown(early, {**early, name: 10.0 + limit}) == []
        assert soak.grown(early, {**early, name: 11.0 + limit}) == [f"{name} grew from 10.0 to {11 + limit:.1f}"]


def test_a_stream_comes_to_the_same_as_a_whole_answer(soak: Any) -> None:
    choice = {"index": 0, "message": {"content": "ab"}, "finish_reason": "stop", "logprobs": {"content": [1, 2]}}
    chunks = [
        {"choices": [{"index": 0, "delta": {"content": text}, "logprobs": {"content": [n]}, "finish_reason": reason}]}
        for text, n, reason in (("a", 1, None), ("b", 2, "stop"))
    ]
    assert soak.joined(iter(chunks), 1) == [soak.kept(choice)]
