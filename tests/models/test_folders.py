"""The folders of the embedded models: small enough for the repo, and what their trainers write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from arriero.models import chasqui, quipu

MODELS = Path(__file__).parents[2] / "models"


@pytest.mark.parametrize("name", ["chasqui", "quipu"])
def test_it_fits_the_repo(name: str) -> None:
    assert sum(file.stat().st_size for file in (MODELS / name).iterdir()) <= 24e6


@pytest.mark.parametrize(
    ("name", "write"), [("chasqui", chasqui.write_skeleton), ("quipu", quipu.write_skeleton)], ids=["chasqui", "quipu"]
)
def test_the_skeleton_is_what_the_trainer_writes(name: str, write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (MODELS / name / file.name).read_bytes(), file.name
