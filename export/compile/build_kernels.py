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
from functools import cache
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

GCC = "GCC 12 or newer"
# As much of C++17 as an old compiler lacks.
PROBE = """\
#include <stdint.h>
template <int n> constexpr int twice() { if constexpr (n > 0) return 2 * n; else return 0; }
inline constexpr int held = twice<2>();
#define NAMED(level) probe_##level
#define NAME(level) NAMED(level)
extern "C" int32_t NAME(ARRIERO_LEVEL)(int32_t x) { return x * held; }
"""


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


def check_compiler(architecture: str) -> str:
    """Give the compiler for `architecture`, after it has compiled a few lines in C++17 for each level of instructions.

    Raises MachineLacks where there is none, or with the reason why it is none for our kernels.
    """
    compiler = find_compiler(architecture)
    reason = _refusal(compiler, architecture)
    if reason is not None:
        raise MachineLacks(
            f"the C++ compiler for {architecture} cannot compile our kernels: {reason}",
            where=compiler,
            expected=GCC,
            remedy="Update it, or put such a compiler first in PATH",
        )
    return compiler


def describe_compiler(architecture: str) -> str | None:
    """What the compiler for `architecture` says of itself in a line; None where there is none that says anything."""
    try:
        return _version(find_compiler(architecture))
    except (MachineLacks, OSError):
        return None


@cache
def _version(compiler: str) -> str | None:
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True, errors="replace")
    return next(iter(said.stdout.splitlines()), None)


@cache
def _refusal(compiler: str, architecture: str) -> str | None:
    """Why a compiler, or what it calls, does not do with a few lines what `build_kernels` and linking ask of it."""
    with tempfile.TemporaryDirectory(prefix="kernels-") as scratch:
        source, joined = Path(scratch) / "probe.cc", str(Path(scratch) / "joined.o")
        source.write_text(PROBE)
        objects = {level: str(Path(scratch) / f"{level}.o") for level in LEVELS[architecture]}
        commands = [
            [compiler, *FLAGS, *flags, f"-DARRIERO_LEVEL={level}", str(source), "-c", "-o", objects[level]]
            for level, flags in LEVELS[architecture].items()
        ]
        commands.append([compiler, "-r", "-nostdlib", "-o", joined, *objects.values()])
        commands.append([compiler, "-shared", "-o", str(Path(scratch) / "probe.so"), joined])
        for command in commands:
            try:
                done = subprocess.run(command, capture_output=True, text=True, errors="replace")
            except OSError as error:
                return error.strerror or str(error)
            if done.returncode:
                return _reason(done.stderr)
            if not Path(command[command.index("-o") + 1]).is_file():
                return "it writes no file"
    return None


def link_shared(kernels: Path, library: Path) -> None:
    """Link the object that `build_kernels` made for this machine into a shared library of its own."""
    _run([find_compiler(platform.machine()), "-shared", "-o", str(library), str(kernels)])


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ArrieroError(
            f"the compiler refuses the kernels: {_reason(done.stderr)}",
            where=" ".join(command),
            expected=GCC,
            remedy="Update the compiler",
        )


def _reason(said: str) -> str:
    lines = said.splitlines()
    return next((line for line in lines if "error" in line), lines[0] if lines else "it gives no reason").strip()
