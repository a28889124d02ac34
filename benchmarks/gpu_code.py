"""Machine code of the kernels and a read probe for one GPU: compiled now, or carried along in a folder.

    python benchmarks/gpu_code.py FOLDER [sm_89 sm_90 ...]

writes it there for a machine without nvcc, for all GPUs that the kernels run on unless some are named: <gpu>.cubin, and
<gpu>.ptx for drivers that refuse the cubin.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import checkout  # noqa: F401

from arriero.errors import MachineLacks
from arriero.export.compile.cuda.build_cuda_kernels import PTX_VERSIONS, assemble, compile_ptx, kernels_for
from arriero.export.compile.cuda.launch import source_of

READ_PROBE = "read_probe"
PROBE = Path(__file__).with_name("read_probe.cu")


def source_for(gpu: str) -> str:
    """C++ of every kernel that `gpu` runs, and of the probe."""
    return source_of(kernels_for(gpu)) + PROBE.read_text(encoding="utf-8")


def code_for(gpu: str, folder: Path | None) -> bytes:
    """What the driver loads: `folder`'s cubin or PTX, or what nvcc makes of the sources now.

    Raises MachineLacks where the folder has neither, or there is no nvcc.
    """
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="cuda-") as scratch:
            out = Path(scratch) / "kernels.cubin"
            assemble(compile_ptx(source_for(gpu), gpu), gpu, out)
            return out.read_bytes()
    for kind in ("cubin", "ptx"):
        path = folder / f"{gpu}.{kind}"
        if path.is_file():
            return path.read_bytes()
    raise MachineLacks(
        f"{folder} has no machine code for {gpu}",
        expected=f"{gpu}.cubin or {gpu}.ptx",
        remedy=f"Write it where nvcc is: `python benchmarks/gpu_code.py FOLDER {gpu}`",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the code, and what the assembler says of registers and spills."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("gpus", nargs="*", choices=[*PTX_VERSIONS, []], default=[])
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    for gpu in options.gpus or PTX_VERSIONS:
        ptx = compile_ptx(source_for(gpu), gpu)
        (options.folder / f"{gpu}.ptx").write_text(ptx, encoding="utf-8")
        words = assemble(ptx, gpu, options.folder / f"{gpu}.cubin")
        (options.folder / f"{gpu}.txt").write_text(words, encoding="utf-8")
        print(f"{gpu}: {ptx.count('.entry ')} kernels")
    return 0


if __name__ == "__main__":
    sys.exit(main())
