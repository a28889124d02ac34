"""The report's header names the machine class, and loads nothing for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from arriero.runtimes.cpu import machine_class
from tests.machines.hidden import older_machine_or_skip
from tests.test_layers import HEAVY

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("arch", "features", "name"),
    [
        ("x86_64", {"avx2", "avx512f", "avx512_vnni", "amx_int8"}, "AMX"),
        ("x86_64", {"avx2", "avx512f", "avx512_vnni"}, "AVX-512 VNNI"),
        ("x86_64", {"avx2", "avx512f"}, "AVX-512 without VNNI"),
        ("x86_64", {"avx2", "avx_vnni"}, "AVX2 with VNNI"),
        ("x86_64", {"avx2", "fma"}, "AVX2"),
        ("x86_64", {"sse2"}, "x86_64"),
        ("aarch64", {"asimd", "asimddp"}, "ARM dotprod"),
        ("riscv64", {"v"}, "riscv64"),
    ],
)
def test_classes_go_by_their_best_feature(arch: str, features: set[str], name: str) -> None:
    assert machine_class(arch, features) == name


def test_the_description_loads_no_heavy_library() -> None:
    script = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
from tests.machines.machine_class import describe_machine
print(describe_machine())
print(sorted(({HEAVY!r} | {{"onnxruntime", "tvm"}}) & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    described, heavy = done.stdout.splitlines()
    assert "SIGINT ignored at the start" in described
    assert heavy == "[]"


def test_hidden_features_change_the_class(tmp_path: Path) -> None:
    script = "from tests.machines.machine_class import describe_machine; print(describe_machine())"
    done = older_machine_or_skip("AVX2", tmp_path).run(sys.executable, "-c", script, cwd=ROOT)
    assert done.stdout.startswith("machine class: AVX2, ")
