"""What a GPU has to do per kilobyte of weights, read from machine code: no GPU is needed.

    python benchmarks/gpu_code.py FOLDER && python benchmarks/gpu_instructions.py FOLDER

One row per GPU and kernel: registers, spilled and shared bytes as ptxas says, and of decode kernels the instructions of
the main loop per KB of weights that it reads, of each copy of the loop (int4 has one per size of blocks; ptxas unrolls
some). Needs `pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`, or CUDA's own.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import checkout  # noqa: F401

from arriero.errors import ArrieroError, MachineLacks

COPIED = 512  # bytes of weights that a warp's copy instruction brings


def find_disassembler() -> str:
    """The path of a cuobjdump with its nvdisasm. Raises MachineLacks without one."""
    in_path = shutil.which("cuobjdump")
    if in_path and shutil.which("nvdisasm"):
        return in_path
    for package in ("nvidia", "triton"):
        spec = importlib.util.find_spec(package)
        for folder in spec.submodule_search_locations or [] if spec else []:
            for path in sorted(Path(folder).rglob("bin/cuobjdump")):
                if path.with_name("nvdisasm").is_file():
                    return str(path)
    raise MachineLacks(
        "there is no cuobjdump with an nvdisasm",
        remedy="Install them: `pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`",
    )


def disassemble(cubin: Path) -> dict[str, str]:
    """Kernel -> its machine code as text. Raises MachineLacks where the tool is too old for the GPU."""
    tool = find_disassembler()
    command, environment = [tool, "--dump-sass", str(cubin)], {"PATH": str(Path(tool).parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode or "Function :" not in done.stdout:
        raise MachineLacks(f"{tool} does not read {cubin.name}: {done.stderr.strip()[:80]}", remedy="Update it")
    parts = done.stdout.split("Function : ")[1:]
    return {part.split()[0]: part for part in parts}


def properties(words: str) -> dict[str, dict[str, int]]:
    """Kernel -> registers, spilled bytes and shared bytes, from the assembler's words."""
    kernels = {}
    for part in words.split("Compiling entry function '")[1:]:
        spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers, shared = re.search(r"Used (\d+) registers", part), re.search(r"(\d+) bytes smem", part)
        assert spills is not None
        assert registers is not None
        kernels[part.split("'")[0]] = {
            "registers": int(registers[1]),
            "spilled": sum(map(int, spills.groups())),
            "shared": int(shared[1]) if shared else 0,
        }
    return kernels


def main_loops(code: str) -> list[float]:
    """Of each innermost loop with products of tensor cores: its instructions per KB of weights, fewest first."""
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", code)]
    loops = []
    for end, text in lines:
        target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if target and int(target[1], 16) <= end:
            start = int(target[1], 16)
            body = [line for at, line in lines if start <= at <= end]
            if any("MMA" in line for line in body):
                loops.append((start, end, body))
    inner = [
        body
        for start, end, body in loops
        if not any(start <= other[0] and other[1] <= end for other in loops if other[:2] != (start, end))
    ]
    return sorted(1024 * len(body) / (COPIED * sum("LDGSTS" in line for line in body)) for body in inner)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of gpu_code.py")
    options = parser.parse_args(arguments)
    print(f"{'gpu':8}{'kernel':28}{'registers':>10}{'spilled':>10}{'shared':>10}  instructions per KB of weights")
    for cubin in sorted(options.folder.glob("*.cubin")):
        code = disassemble(cubin)
        for name, of in properties(cubin.with_suffix(".txt").read_text(encoding="utf-8")).items():
            loops = ", ".join(f"{count:.0f}" for count in main_loops(code[name])) if "_decode_" in name else ""
            print(
                f"{cubin.stem:8}{name:28}{of['registers']:>10}{of['spilled']:>10}{of['shared']:>10}  {loops}".rstrip()
            )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ArrieroError as error:
        sys.exit(str(error))
