"""Quantised checkpoints, from the library that wrote them to bundles that answer: two of `tests.long.layouts`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.long.layouts import build


@pytest.mark.parametrize(
    ("name", "needs"), [("compressed_tensors-w4a16", "compressed_tensors"), ("gguf-Q4_K", "xllamacpp")]
)
def test_a_quantised_checkpoint_is_built_and_answers(tmp_path: Path, name: str, needs: str) -> None:
    pytest.importorskip(needs, reason=f"needs {needs}, of the extra `test`")
    lines: list[str] = []
    build(tmp_path, name, lines.append)
    assert "kept as stored" in lines[0] if name.startswith("compressed") else "rounded anew" in lines[0]
