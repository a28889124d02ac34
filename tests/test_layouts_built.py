"""Quantised checkpoints, from the library that wrote them to bundles that answer: one of `tests.long.layouts`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.long.layouts import build


def test_codes_that_are_kept_cost_nothing(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="needs the package compressed-tensors, of the extra `test`")
    lines: list[str] = []
    divergence = build(tmp_path, "compressed_tensors-fp8-dynamic", lines.append)
    assert "36 kept as stored" in lines[0]
    assert "rounded anew" not in lines[0]
    # Float8 weights times float32 activations: what is left is the order of float32 sums.
    assert divergence["tvm"] < 1e-9
    assert divergence["ort"] < 1e-9
