"""The accuracy of profiles for GPUs, measured as the benchmark does it, on a few cases."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_int4_is_lowered_run_and_held_against_its_rtn_baseline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    benchmark = importlib.import_module("gpu_profiles")
    text = (ROOT / "benchmarks/gpu_profiles.yaml").read_text()
    text = text.replace("../models", str(ROOT / "models")).replace("../bundles/gpu-profiles", str(tmp_path / "out"))
    text = text.replace("samples: 400", "samples: 20").replace("samples: 200", "samples: 2")
    file = tmp_path / "build.yaml"
    file.write_text(text)
    code = benchmark.main([str(file), "--targets", "gpu-int4"])
    found = json.loads(capsys.readouterr().out.rpartition("}")[0] + "}")
    assert (found["target"], code) == ("gpu-int4", 1 if found["failed"] else 0)
    assert 0 < found["rows"]["logits_kl_mean"] < found["rows"]["rtn_kl_mean"]
    assert found["rows"]["router_agreement"] > 0.95
