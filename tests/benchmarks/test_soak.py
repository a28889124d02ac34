"""A short run of the soak: bundles loaded and closed again and again, and short-lived threads, leave nothing behind."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[2] / "benchmarks" / "soak.py"


@pytest.mark.parametrize("backend", ["onnxruntime", "tvm"])
def test_reloads_and_short_lived_threads_leave_memory_and_threads_flat(request, backend):
    workshop = request.getfixturevalue("workshop" if backend == "onnxruntime" else "tvm_workshop")
    command = [sys.executable, SOAK, workshop / "bundles" / "fp32", "--reloads", "30", "--callers", "40"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "30 reloads" in done.stdout
    assert "40 callers" in done.stdout


def test_what_grows_is_told(monkeypatch):
    monkeypatch.syspath_prepend(SOAK.parent)
    soak = importlib.import_module("soak")
    early = dict.fromkeys(soak.LIMITS, 10.0)
    assert soak.grown({"early": early, "end": early}) == []
    for name, limit in soak.LIMITS.items():
        within, beyond = ({**early, name: 10.0 + limit + more} for more in (0, 1))
        assert soak.grown({"early": early, "end": within}) == []
        assert soak.grown({"early": early, "end": beyond}) == [f"{name} grew from 10 to {11 + limit:.0f}"]
