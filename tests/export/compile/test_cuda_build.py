"""The CUDA kernels compiled for architectures of each kind: registers, instructions, arguments. Nothing runs on a GPU.

With ARRIERO_EVERY_GPU=1 they are compiled for every architecture.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import shutil
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

from arriero.errors import ArrieroError, MachineLacks
from arriero.export.compile.cuda import build_cuda_kernels
from arriero.export.compile.cuda.build_cuda_kernels import (
    PTX_VERSIONS,
    SOURCES,
    assemble,
    build_kernel,
    compile_ptx,
    find_nvcc,
    kernels_for,
    sources_hash,
)
from arriero.export.compile.cuda.launch import KERNELS, SCALARS, Kernel, source_of
from arriero.graphs.lower.tensorrt import PLUGINS_SINCE
from arriero.traits import TRAITS

REGISTERS = 65_536  # of a multiprocessor
# Blocks of it: of decode with eight warps and four, of prefill
BLOCKS = {("decode", 256): 3, ("decode", 128): 4, ("prefill", 128): 2}
SHARED_BYTES = 48 * 1024  # what a kernel has without asking for more
MOST_INSTRUCTIONS = {"exact": 60, "int8": 80, "fp8": 140, "int4": 200}  # of decode's main loop, per KB of weights
BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
# One of each set of instructions; with the variable all, which takes twice as long.
FAMILIES = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
GPUS = tuple(PTX_VERSIONS) if os.environ.get("ARRIERO_EVERY_GPU") else FAMILIES
ONE = Kernel("gate_up", "decode", "f16", "int4")


@pytest.fixture(scope="module")
def nvcc():
    try:
        return find_nvcc()
    except MachineLacks as lacks:
        pytest.skip(f"needs nvcc: {lacks}")


@pytest.fixture(scope="module")
def instructions():
    """What reads machine code: the benchmark's."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("gpu_instructions")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def compiled(request, nvcc):
    """PTX of all kernels, machine code of it and the assembler's words, per GPU; once per version of the sources."""
    folder = request.config.cache.mkdir("cuda") / f"cubin-{sources_hash()[:16]}"

    def compile_one(gpu: str) -> tuple[str, Path, str]:
        ptx, code, said = (folder / f"{gpu}.{kind}" for kind in ("ptx", "cubin", "txt"))
        if not said.is_file():
            ptx.write_text(compile_ptx(source_of(kernels_for(gpu)), gpu))
            said.write_text(assemble(ptx.read_text(), gpu, code))
        return ptx.read_text(), code, said.read_text()

    folder.mkdir(exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(GPUS, pool.map(compile_one, GPUS), strict=True))


@pytest.mark.parametrize("gpu", GPUS)
def test_every_kernel_fits_the_registers_and_the_shared_memory(instructions, compiled, gpu):
    found = instructions.properties(compiled[gpu][2])
    assert set(found) == {kernel.name for kernel in kernels_for(gpu)}
    for kernel in kernels_for(gpu):
        used = found[kernel.name]
        assert used["spilled"] == 0, kernel.name
        blocks = BLOCKS[kernel.shape, kernel.threads] - (kernel.threads == 256 and int(gpu[3:]) > 90)
        assert used["registers"] <= REGISTERS // (blocks * kernel.threads), (kernel.name, used)
        assert 0 < used["shared"] <= SHARED_BYTES, (kernel.name, used)


@pytest.fixture(scope="module")
def machine_code(instructions, compiled):
    """Kernel -> its machine code of a GPU; skips where no tool reads it."""

    @cache
    def of(gpu: str) -> dict[str, str]:
        try:
            return instructions.disassemble(compiled[gpu][1])
        except MachineLacks as lacks:
            pytest.skip(f"needs cuobjdump and nvdisasm: {lacks}")

    return of


def product_of(name: str, gpu: str) -> str:
    """The tensor-core instruction of a kernel. Products of E4M3 are float16's where `mma.sync` has none of its own."""
    if name.endswith("_int8"):
        return "IMMA.16832.S8.S8"
    if name.endswith("_fp8") and gpu in ("sm_89", "sm_120", "sm_121"):
        return "QMMA.16832.F32.E4M3.E4M3"
    return "HMMA.16816.F32.BF16" if "_bf16_" in name else "HMMA.16816.F32"


@pytest.mark.parametrize("gpu", GPUS)
def test_the_machine_code_has_tensor_cores_and_wide_copies(machine_code, gpu):
    """Of each kernel: 128-bit asynchronous copies, 128-bit reads of shared memory, its own tensor-core products and no
    others; and neither local memory nor narrow reads of weights."""
    kernels = machine_code(gpu)
    assert set(kernels) == {kernel.name for kernel in kernels_for(gpu)}
    for name, part in kernels.items():
        products = set(re.findall(r"\b[A-Z]MMA\.[A-Z0-9.]+", part))
        assert products == {product_of(name, gpu)}, name
        assert re.search(r"LDGSTS\.E(\.LTC128B)?\.BYPASS(\.LTC128B)?\.128", part), name
        assert "LDS.128" in part, name
        assert not re.search(r"\b(LDL|STL)\b", part), name


@pytest.mark.parametrize("gpu", GPUS)
def test_decode_takes_few_instructions_per_kilobyte_of_weights(instructions, machine_code, gpu):
    """So that memory bounds it: a multiprocessor of an H200 gets a KB in about 50 cycles, of four instructions each."""
    for name, code in machine_code(gpu).items():
        if "_decode_" in name:
            loops = instructions.main_loops(code)
            form = name.rpartition("_")[2]
            assert len(loops) == (3 if form == "int4" else 1), name
            assert loops[-1] <= MOST_INSTRUCTIONS[form], (name, loops)


@pytest.mark.parametrize("gpu", GPUS)
def test_ptx_has_the_oldest_version_that_knows_the_gpu(compiled, gpu):
    ptx = compiled[gpu][0]
    assert ptx.count(f".version {PTX_VERSIONS[gpu]}\n.target {gpu}\n") == 1
    assert "cp.async.cg.shared.global.L2::128B" in ptx
    for product in ("m16n8k16.row.col.f32.f16", "m16n8k16.row.col.f32.bf16", "m16n8k32.row.col.s32.s8.s8.s32"):
        assert f"mma.sync.aligned.{product}" in ptx
    assert ("m16n8k32.row.col.f32.e4m3.e4m3.f32" in ptx) == (int(gpu.removeprefix("sm_")) >= 89)


def test_an_older_ptx_is_refused_by_the_assembler(compiled, tmp_path):
    """So the stamp is checked: products of E4M3 came with 8.4."""
    with pytest.raises(ArrieroError, match=r"FP8 .*requires PTX ISA \.version 8\.4"):
        assemble(compiled["sm_89"][0].replace(".version 8.4", ".version 8.3"), "sm_89", tmp_path / "kernels.cubin")


def test_the_graphs_have_plugins_where_there_are_kernels():
    """`graphs` may not import the list of GPUs, so it says since when."""
    assert list(PTX_VERSIONS) == [f"sm_{number}" for number in TRAITS["tensorrt"].gpus if number >= PLUGINS_SINCE]


def signature(ptx: str) -> list[str]:
    """Types of the parameters of the only entry."""
    (parameters,) = re.findall(r"\.entry \w+\(([^)]*)\)", ptx)
    return re.findall(r"\.param \.(\w+)", parameters)


@pytest.mark.parametrize("op", ["gate_up", "down"])
def test_arguments_are_arrays_then_scalars_then_the_result(nvcc, op):
    for form in ("exact", "fp8"):
        kernel = Kernel(op, "prefill", "f16", form)
        blob = build_kernel(kernel, "sm_90")
        assert signature(blob.ptx) == ["u64"] * len(kernel.arrays) + ["u32"] * len(SCALARS) + ["u64"]
        assert f".visible .entry {kernel.name}(" in blob.ptx


def test_the_same_sources_give_the_same_hash(nvcc):
    first, second = build_kernel(ONE, "sm_89"), build_kernel(ONE, "sm_89")
    assert first.sha256 == second.sha256 == hashlib.sha256(first.ptx.encode()).hexdigest()
    assert build_kernel(ONE, "sm_90").sha256 != first.sha256


def test_the_hash_of_the_sources_follows_them(nvcc, tmp_path, monkeypatch):
    before = sources_hash()
    for source in [*SOURCES.glob("*.h"), *SOURCES.glob("*.cu")]:
        shutil.copy(source, tmp_path)
    monkeypatch.setattr(build_cuda_kernels, "SOURCES", tmp_path)
    assert sources_hash() == before
    with (tmp_path / "decode.h").open("a") as file:
        file.write("\n")
    assert sources_hash() != before


@pytest.mark.parametrize("gpu", ["sm_75", "sm_101", "cpu"])
def test_a_gpu_without_the_instructions_is_refused(gpu):
    with pytest.raises(ArrieroError, match=f"do not run on {gpu}; expected one of sm_80, "):
        build_kernel(ONE, gpu)


@pytest.mark.parametrize("gpu", ["sm_80", "sm_86", "sm_87"])
def test_float8_is_refused_where_the_gpu_has_no_such_product(gpu):
    with pytest.raises(ArrieroError, match=f"down_decode_f16_fp8: {gpu} has no products .* expected sm_89 or newer"):
        build_kernel(Kernel("down", "decode", "f16", "fp8"), gpu)
    assert {kernel.form for kernel in set(KERNELS) - set(kernels_for(gpu))} == {"fp8"}


def test_without_a_compiler_the_remedy_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(build_cuda_kernels.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MachineLacks, match=r"no CUDA compiler.*pip install nvidia-cuda-nvcc"):
        find_nvcc()


def test_the_compiler_is_found_where_cuda_home_says(monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    for tool in ("nvcc", "ptxas"):
        (tmp_path / "bin" / tool).touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert find_nvcc() == tmp_path / "bin" / "nvcc"


def test_a_compiler_that_fails_is_quoted(nvcc):
    with pytest.raises(ArrieroError, match=r"refuses the kernels for sm_89: .*error.*; expected CUDA 12\.8"):
        compile_ptx("int f( {\n", "sm_89")


def test_the_packages_data_has_the_sources():
    """What an installed package compiles from."""
    settings = tomllib.loads((SOURCES.parents[2] / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "arriero.export.compile.cuda" in settings["packages"]
    patterns = settings["package-data"]["arriero.export.compile.cuda"]
    files = {path.name for path in SOURCES.iterdir() if path.suffix in (".h", ".cu")}
    assert files == {path.name for pattern in patterns for path in SOURCES.glob(pattern)}
