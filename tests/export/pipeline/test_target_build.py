"""What this machine would have to be to run a target: targets for others are published without a proof."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from arriero.export.build_file.schema import Target
from arriero.export.pipeline.target_build import TargetBuild
from arriero.runtimes import cpu

FEATURES = ("avx2", "avx512_vnni", "avx512f")


@pytest.mark.parametrize(
    ("have", "device"),
    [
        ({"avx2"}, "a machine with avx512_vnni, avx512f"),
        ({*FEATURES, "amx_int8"}, None),
        (set(), None),  # the system does not tell
    ],
)
def test_a_better_processor_of_this_architecture(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, have: set[str], device: str | None
) -> None:
    monkeypatch.setattr(cpu, "cpu_features", lambda: frozenset(have))
    name = f"{cpu.architecture()}-linux-gnu"
    target = Target(name="t", backend="tvm", profile="int8", cpu=name)
    build: Any = SimpleNamespace(profiles={"int8": None}, config=SimpleNamespace(output=tmp_path))
    assert TargetBuild(build, target).device_with(FEATURES) == device
