"""Older processors on this one: the environment in which a process sees a processor without newer features."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("hide_cpu_features.c")
# What each machine class lacks, as beginnings of Linux's names.
MACHINES = {
    "AVX2": "avx512,avx_vnni,amx",
    "AVX-512 without VNNI": "avx512_vnni,avx_vnni,amx",
    "AVX-512 VNNI": "amx",
}


def environment(machine: str, folder: Path) -> dict[str, str]:
    """The environment of a process on a `machine` of MACHINES; skips the test where this one cannot stand in for it.

    `folder` takes the library that is preloaded.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("needs Linux on x86-64")
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    library = folder / "hide_cpu_features.so"
    command = ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"]
    subprocess.run(command, check=True)
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}  # no worker
    hidden = own | {"LD_PRELOAD": str(library), "HIDDEN_CPU_FEATURES": MACHINES[machine]}
    if subprocess.run(["true"], env=hidden, capture_output=True).returncode:
        pytest.skip("needs a kernel and a processor that let CPUID fault (cpuid_fault in /proc/cpuinfo)")
    return hidden
