"""One small multimodal build, made once by the real command and read by every test that needs a whole bundle."""

from __future__ import annotations

from pathlib import Path

import pytest

from arriero.profiles.recipe import shipped
from tests.command import arriero, write_build
from tests.small import small_scout


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `scout` (checkpoint), `build.yaml` and `bundles/fp32`, `bundles/int8`. Read-only."""
    folder = tmp_path_factory.mktemp("workshop")
    small_scout(folder / "scout")
    # The shipped profile but for its thresholds: random routers are undecided, and rounding turns their choices.
    rounded = shipped()["int8"].read_text().replace("router_agreement: 0.99", "router_agreement: 0.8")
    (folder / "int8.yaml").write_text(rounded)
    write_build(folder / "build.yaml", Path("scout"), profiles=workshop_profiles(folder), samples=8)
    built = arriero("build", folder / "build.yaml")
    assert built.code == 0, built.err
    return folder


def workshop_profiles(workshop: Path) -> tuple[str, str]:
    """The profiles of the workshop's targets, as any build file may name them."""
    return "fp32", str(workshop / "int8.yaml")
