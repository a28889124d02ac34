"""What each of llama.cpp's files loses is told: next to nothing for halves, the more the fewer its bits."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

from tests.small import cut_chasqui

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_few_bits_lose_more_than_halves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = pytest.importorskip("tests.layouts.gguf", exc_type=ImportError)
    monkeypatch.syspath_prepend(BENCHMARKS)
    script = importlib.import_module("peer_quality")
    model = cut_chasqui(tmp_path / "model", layers=2, experts=4)
    files = []
    for kind in ("F16", "Q8_0", "Q4_0"):
        writer.write(model, tmp_path / kind, kind, torch.bfloat16)
        (tmp_path / kind / f"mmproj-{kind}.gguf").unlink()  # the file of the text model alone is measured
        files.append(str(tmp_path / kind / f"model-{kind}.gguf"))
    monkeypatch.setattr(sys, "argv", ["peer_quality.py", str(model), *files, "--samples", "8"])
    script.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [Path(file).name for file in files]
    halves, eight, four = (float(re.search(r"mean KL (\S+) ±", line)[1]) for line in lines)  # type: ignore[index]
    assert halves < 1e-5
    assert halves < eight < four / 10
    assert re.search(r" tokens, \d of 8 answers right$", lines[0])


def test_a_file_of_another_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = pytest.importorskip("tests.layouts.gguf", exc_type=ImportError)
    monkeypatch.syspath_prepend(BENCHMARKS)
    script = importlib.import_module("peer_quality")
    smaller, model = (cut_chasqui(tmp_path / str(layers), layers, experts=4) for layers in (1, 2))
    writer.write(smaller, tmp_path / "gguf", "F16", torch.bfloat16)
    with pytest.raises(ValueError, match=r"holds other tensors than .*layers\.1\."):
        script.put_weights(model, tmp_path / "gguf" / "model-F16.gguf", tmp_path / "made")
