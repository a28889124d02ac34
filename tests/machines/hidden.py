"""Older processors on this one: how a process is run that sees a processor without newer features.

Where CPUID can be made to fault they are hidden at the processor's own speed. Elsewhere qemu can emulate one of the
machines, that with AVX2, some thirty times slower: only where EMULATES is set.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("hide_cpu_features.c")
EMULATOR, EMULATES = "qemu-x86_64-static", "ARRIERO_EMULATE_AVX2"
# What each machine class lacks, as beginnings of Linux's names.
MACHINES = {
    "AVX2": "avx512,avx_vnni,amx",
    "AVX-512 without VNNI": "avx512_vnni,avx_vnni,amx",
    "AVX-512 VNNI": "amx",
}


@dataclass(frozen=True)
class OlderMachine:
    """What a command gets before it, and its environment."""

    prefix: tuple[str, ...]
    env: dict[str, str]

    def run(self, *command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run `command` there and give what it printed."""
        return subprocess.run([*self.prefix, *command], env=self.env, cwd=cwd, capture_output=True, text=True)


def older_machine(machine: str, folder: Path) -> OlderMachine:
    """A `machine` of MACHINES; skips the test where this one cannot stand in for it.

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
    if subprocess.run(["true"], env=hidden, capture_output=True).returncode == 0:
        return OlderMachine((), hidden)
    needs = "a kernel and a processor that let CPUID fault (cpuid_fault in /proc/cpuinfo)"
    if machine != "AVX2":
        pytest.skip(f"needs {needs}")
    if shutil.which(EMULATOR) is None or not os.environ.get(EMULATES):
        pytest.skip(f"needs {needs}, or {EMULATOR} of Debian's qemu-user-static and {EMULATES}=1 (minutes a test)")
    return OlderMachine((EMULATOR, "-cpu", "max"), hidden | {"CPUID_IS_EMULATED": "1"})
