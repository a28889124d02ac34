"""One small multimodal build, made once by the real command and read by every test that needs a whole bundle."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command import arriero, write_build
from tests.small import small_scout


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `scout` (checkpoint), `build.yaml` and `bundles/fp32`, `bundles/int8`. Read-only."""
    folder = tmp_path_factory.mktemp("workshop")
    small_scout(folder / "scout")
    write_build(folder / "build.yaml", Path("scout"), profiles=("fp32", "int8"), samples=8)
    built = arriero("build", folder / "build.yaml")
    assert built.code == 0, built.err
    return folder
