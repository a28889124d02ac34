"""Older processors on this one: a process that sees a processor without newer features, at this one's own speed.

    python -m tests.machines.hidden AVX2 make test

runs a command on such a machine. Its own code, and what it loads, asks the processor by CPUID, which is made to fault:
by the kernel where the processor can (cpuid_fault in /proc/cpuinfo), else in each library as it is loaded.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

HIDES, TRAPS = "hide_cpu_features", "trap_cpuid"
# What each machine class lacks, as beginnings of Linux's names.
MACHINES = {
    "AVX2": "avx512,avx_vnni,amx",
    "AVX-512 without VNNI": "avx512_vnni,avx_vnni,amx",
    "AVX-512 VNNI": "amx",
}


@dataclass(frozen=True)
class OlderMachine:
    """The environment that makes this machine an older one."""

    env: dict[str, str]

    def run(self, *command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run `command` there and give what it printed."""
        return subprocess.run(command, env=self.env, cwd=cwd, capture_output=True, text=True)


def missing() -> str | None:
    """What this machine lacks to stand in for an older one, if anything."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "Linux on x86-64"
    tools = [tool for tool in ("gcc", "objdump") if shutil.which(tool) is None]
    return " and ".join(tools) or None


def older_machine(machine: str, folder: Path) -> OlderMachine:
    """A `machine` of MACHINES; `folder` takes the libraries that are loaded before others."""
    hidden = dict(os.environ) | {"LD_PRELOAD": str(compiled(HIDES, folder)), "HIDDEN_CPU_FEATURES": MACHINES[machine]}
    if subprocess.run(["true"], env=hidden, capture_output=True).returncode:  # CPUID cannot fault
        hidden |= {"LD_AUDIT": str(compiled(TRAPS, folder)), "CPUID_IS_TRAPPED": "1"}
    return OlderMachine(hidden)


def compiled(name: str, folder: Path) -> Path:
    """The library of `name`.c beside this file, in `folder`."""
    library = (folder / name).with_suffix(".so")
    source = Path(__file__).with_name(f"{name}.c")
    command = ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", library, source, "-ldl"]
    subprocess.run(command, check=True)
    return library


def older_machine_or_skip(machine: str, folder: Path) -> OlderMachine:
    """As `older_machine`, for a test, whose own processes are no workers of this run."""
    if needs := missing():
        pytest.skip(f"needs {needs}")
    older = older_machine(machine, folder)
    return OlderMachine({name: value for name, value in older.env.items() if not name.startswith("PYTEST_XDIST")})


def main() -> int:
    """Run the command and give its exit code."""
    if len(sys.argv) < 3 or sys.argv[1] not in MACHINES:
        sys.exit(f"{__doc__}\nmachines: {', '.join(MACHINES)}")
    if needs := missing():
        sys.exit(f"needs {needs}")
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.call(sys.argv[2:], env=older_machine(sys.argv[1], Path(folder)).env)


if __name__ == "__main__":
    sys.exit(main())
