"""A dense model at small width against transformers, by the command; `tests/long/dense.py` does it at Guard's width."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.long.dense import TOLERANCE, run

pytest.importorskip("transformers")


@pytest.mark.parametrize("backend", ["onnxruntime", "tvm"])
def test_a_dense_model_is_built_run_and_equals_transformers(tmp_path: Path, backend: str) -> None:
    if backend == "tvm":
        pytest.importorskip("tvm", reason="needs apache-tvm: pip install 'arriero[tvm]'")
    assert run(tmp_path, (backend,))[backend] <= TOLERANCE
