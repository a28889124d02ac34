"""Compiles the CUDA kernels ahead of time, to PTX for an engine and to machine code to be checked or loaded directly.

One blob holds one kernel, because a plugin's layer carries its own.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from arriero.errors import ArrieroError, MachineLacks
from arriero.export.compile.cuda.launch import KERNELS, Kernel, source_of
from arriero.profiles.float8 import FP8_SINCE

SOURCES = Path(__file__).parent
# The GPUs that the kernels are compiled for, and the oldest PTX that knows them and what the kernels ask of them (on
# sm_89 and sm_90, products of E4M3). A driver refuses PTX newer than itself, and nvcc stamps its own version on code
# that needs nothing new, so the stamp is taken back to this; ptxas then checks that it holds.
PTX_VERSIONS = {
    "sm_80": "7.4",
    "sm_86": "7.4",
    "sm_87": "7.4",
    "sm_89": "8.4",
    "sm_90": "8.4",
    "sm_100": "8.6",
    "sm_103": "8.8",
    "sm_110": "9.0",
    "sm_120": "8.7",
    "sm_121": "8.8",
}
WHEELS = "nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-crt nvidia-nvvm"
FLAGS = ("-std=c++17", "-O3", "-Werror=all-warnings")


@dataclass(frozen=True)
class Blob:
    """A kernel compiled for `gpu`. `sha256` is what the manifest's `plugins` records: that of the PTX."""

    kernel: Kernel
    gpu: str
    ptx: str
    sha256: str


def kernels_for(gpu: str) -> tuple[Kernel, ...]:
    """The kernels that `gpu` ("sm_89") runs. Raises ArrieroError for a GPU that runs none."""
    if gpu not in PTX_VERSIONS:
        raise ArrieroError(
            f"the experts' CUDA kernels do not run on {gpu}",
            expected=f"one of {', '.join(PTX_VERSIONS)}",
            remedy="Choose such a GPU, or the portable form of the experts",
        )
    return tuple(kernel for kernel in KERNELS if kernel.runs_on(gpu))


def build_kernel(kernel: Kernel, gpu: str) -> Blob:
    """Compile `kernel` for `gpu` ("sm_89"). Raises ArrieroError for a GPU it does not run on, MachineLacks without a
    compiler. The same sources and compiler give the same bytes."""
    if kernel not in kernels_for(gpu):
        raise ArrieroError(
            f"{gpu} has no products of weights in {kernel.form!r}",
            where=kernel.name,
            expected=f"sm_{FP8_SINCE} or newer",
            remedy="Choose such a GPU, or a profile in int8",
        )
    ptx = compile_ptx(source_of([kernel]), gpu)
    return Blob(kernel, gpu, ptx, hashlib.sha256(ptx.encode()).hexdigest())


def compile_ptx(source: str, gpu: str) -> str:
    """PTX of `source` for `gpu`, readable by any driver that knows the architecture."""
    nvcc = find_compilers()
    with tempfile.TemporaryDirectory(prefix="cuda-") as scratch:
        # a name that does not change, as it may end up in what is compiled
        (Path(scratch) / "kernels.cu").write_text(source)
        command = [str(nvcc), *FLAGS, f"-arch={gpu}", "--ptx", f"-I{SOURCES}", "kernels.cu", "-o", "kernels.ptx"]
        _run(command, gpu, scratch)
        ptx = (Path(scratch) / "kernels.ptx").read_text()
    return re.sub(r"^\.version \S+$", f".version {PTX_VERSIONS[gpu]}", ptx, flags=re.MULTILINE)


def assemble(ptx: str, gpu: str, out: Path) -> str:
    """Write machine code of `ptx` to `out`; gives what the assembler says of registers and spills."""
    with tempfile.TemporaryDirectory(prefix="cuda-") as scratch:
        path = Path(scratch) / "kernels.ptx"
        path.write_text(ptx)
        assembler = find_nvcc().with_name("ptxas")
        return _run([str(assembler), "-v", f"-arch={gpu}", str(path), "-o", str(out)], gpu)


def sources_hash() -> str:
    """The SHA-256 of everything that the kernels are compiled from, the compiler's version included."""
    digest = hashlib.sha256()
    for path in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cu")]):
        digest.update(f"{path.name}\0{path.read_text(encoding='utf-8')}\0".encode())
    digest.update("\0".join([*FLAGS, nvcc_version()]).encode())
    return digest.hexdigest()


@cache
def nvcc_version() -> str:
    """What nvcc says of itself, in its last line."""
    return _run([str(find_nvcc()), "--version"], "").strip().splitlines()[-1]


def find_compilers() -> Path:
    """Give CUDA's compiler, which has the C++ compiler beside it that it needs. Raises MachineLacks without both."""
    nvcc = find_nvcc()
    if shutil.which("g++") is None:
        raise MachineLacks("nvcc needs a C++ compiler (`g++`)", remedy="Install it: `apt-get install g++`")
    return nvcc


def find_nvcc() -> Path:
    """Give CUDA's compiler: $CUDA_HOME's, the one in PATH, or that of the wheel `nvidia-cuda-nvcc`.

    Raises MachineLacks with how to install it.
    """
    home = os.environ.get("CUDA_HOME")
    places = [Path(home) / "bin"] if home else []
    in_path = shutil.which("nvcc")
    if in_path:
        places += [Path(in_path).parent, Path(in_path).resolve().parent]  # it may be a link from elsewhere
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or [] if spec else []:
        places += [*sorted(Path(folder).glob("cu*/bin"), reverse=True), Path(folder) / "cuda_nvcc" / "bin"]
    for place in places:
        if (place / "nvcc").is_file() and (place / "ptxas").is_file():
            return place / "nvcc"
    raise MachineLacks(
        "there is no CUDA compiler (`nvcc`): the experts' kernels cannot be compiled",
        expected="CUDA 12.8 or newer; 13.0 for Jetson Thor (sm_110)",
        remedy=f"Install it: `pip install {WHEELS}`, or CUDA's own package",
    )


def _run(command: Sequence[str], gpu: str, folder: str | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    said = done.stdout + done.stderr
    if done.returncode:
        lines = said.splitlines()
        reason = next(
            (line for line in lines if "error" in line or "fatal" in line), lines[0] if lines else "no reason"
        )
        raise ArrieroError(
            f"the CUDA compiler refuses the kernels for {gpu}: {reason.strip()}",
            where=" ".join(command),
            expected="CUDA 12.8 or newer; 13.0 for Jetson Thor (sm_110)",
            remedy="Update the compiler",
        )
    return said
