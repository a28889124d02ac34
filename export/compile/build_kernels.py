"""Compiles the C++ kernels for one architecture, each instruction-set level apart, into one object file.

The levels share no inline function and no flags, so that a CPU without a level never runs that level's code.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from arriero.errors import ArrieroError, MachineLacks
from arriero.runtimes.cpu import usable_cores

SOURCES = Path(__file__).parent / "kernels"
# What each level may use; select.cc asks the CPU for the same, and takes the first that it has.
LEVELS: dict[str, dict[str, list[str]]] = {
    "x86_64": {
        "amx": ["-march=x86-64-v4", "-mavx512vnni", "-mamx-tile", "-mamx-int8", "-mprefer-vector-width=512"],
        "avx512vnni": ["-march=x86-64-v4", "-mavx512vnni", "-mprefer-vector-width=512"],
        "avx2": ["-march=x86-64-v3"],
        "scalar": ["-march=x86-64"],
    },
    "aarch64": {
        "i8mm": ["-march=armv8.2-a+dotprod+i8mm"],
        "dotprod": ["-march=armv8.2-a+dotprod"],
        "neon": ["-march=armv8-a"],
    },
}
# What no level is compiled for.
COMMON = ("select", "run", "expert_cache")
# No standard library and no C++ runtime: what links the object needs libc and the compiler's own support only. Levels
# and machines must round alike, so products and sums are not fused behind our back. Two warnings are off because GCC 12
# gives them for its own AVX-512 header.
FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-fno-exceptions", "-fno-rtti", "-fno-math-errno", "-ffp-contract=off"),
    *("-Wall", "-Wextra", "-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"),
]


def build_kernels(architecture: str, out: Path) -> None:
    """Write the relocatable object `out` with all kernels of `architecture` ("x86_64" or "aarch64").

    Raises ArrieroError for an architecture we have no kernels for, MachineLacks without a compiler for it.
    """
    if architecture not in LEVELS:
        raise ArrieroError(
            f"there are no kernels for {architecture!r}", expected=f"one of {', '.join(LEVELS)}", remedy="Choose one"
        )
    compiler = find_compiler(architecture)
    with tempfile.TemporaryDirectory(prefix="kernels-") as scratch:
        objects = {name: Path(scratch) / f"{name}.o" for name in (*COMMON, *LEVELS[architecture])}

        def compile_one(name: str) -> None:
            extra = [str(SOURCES / f"{name}.cc")]
            if name not in COMMON:
                extra = [*LEVELS[architecture][name], f"-DARRIERO_LEVEL={name}", str(SOURCES / "level.cc")]
            _run([compiler, *FLAGS, *extra, "-c", "-o", str(objects[name])])

        with ThreadPoolExecutor(usable_cores()) as pool:
            list(pool.map(compile_one, objects))
        joined = Path(scratch) / "joined.o"
        _run([compiler, "-r", "-nostdlib", "-o", str(joined), *map(str, objects.values())])
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(f"{out.name}.partial")
        shutil.copyfile(joined, partial)
        partial.replace(out)


def find_compiler(architecture: str) -> str:
    """Give the C++ compiler for `architecture` on this machine. Raises MachineLacks naming the package to install."""
    native = platform.machine() == architecture
    name = "g++" if native else f"{architecture.replace('_', '-')}-linux-gnu-g++"
    compiler = shutil.which(name)
    if compiler is None:
        package = "g++" if native else name.replace("-linux-gnu-g++", "").join(("g++-", "-linux-gnu"))
        raise MachineLacks(
            f"there is no C++ compiler for {architecture} (`{name}`)",
            remedy=f"Install it: `apt-get install {package}` on Debian or Ubuntu",
        )
    return compiler


def link_shared(kernels: Path, library: Path) -> None:
    """Link the object that `build_kernels` made for this machine into a shared library of its own."""
    _run([find_compiler(platform.machine()), "-shared", "-o", str(library), str(kernels)])


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.splitlines()
        reason = next((line for line in lines if "error" in line), lines[0] if lines else "it gives no reason")
        raise ArrieroError(
            f"the compiler refuses the kernels: {reason.strip()}",
            where=" ".join(command),
            expected="GCC 12 or newer",
            remedy="Update the compiler",
        )
