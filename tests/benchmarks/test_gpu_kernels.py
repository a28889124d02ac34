"""The GPU benchmark's command over a driver that runs the kernels in the emulation. No speed is measured here."""

from __future__ import annotations

import ctypes
import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from arriero.errors import MachineLacks
from arriero.export.compile.cuda.build_cuda_kernels import find_nvcc
from arriero.export.compile.cuda.launch import KERNELS, SCALARS, THREADS
from tests.cuda_emulator import FORWARD, cached_library

FOLDER = Path(__file__).parents[2] / "benchmarks"


class Driver:
    """NVIDIA's driver as far as the benchmark calls it: device memory is the host's, a launch is emulated."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.emulate.restype = ctypes.c_char_p
        self.memory: dict[int, np.ndarray] = {}
        self.kernels: list[str] = []
        self.failure = b""
        self.minor = 9

    def cuInit(self, flags):
        return 0

    def cuDeviceGet(self, device, number):
        return 0

    def cuDevicePrimaryCtxRetain(self, context, device):
        return 0

    def cuCtxSetCurrent(self, context):
        return 0

    def cuCtxSynchronize(self):
        return 700 if self.failure else 0

    def cuGetErrorString(self, code, text):
        text._obj.value = self.failure
        return 0

    def cuDeviceGetName(self, name, size, device):
        name.value = b"Emulated"
        return 0

    def cuDeviceGetAttribute(self, value, attribute, device):
        value._obj.value = {75: 8, 76: self.minor}[attribute]
        return 0

    def cuDriverGetVersion(self, version):
        version._obj.value = 13000
        return 0

    def cuMemAlloc_v2(self, address, size):
        # as the driver's, more finely aligned than the host's
        block = np.full(size.value + 256, 255, np.uint8)
        address._obj.value = -(-block.ctypes.data // 256) * 256
        self.memory[address._obj.value] = block
        return 0

    def cuMemFree_v2(self, address):
        del self.memory[address.value]
        return 0

    def cuMemcpyHtoD_v2(self, to, source, size):
        ctypes.memmove(to.value, source.value, size.value)
        return 0

    cuMemcpyDtoH_v2 = cuMemcpyHtoD_v2

    def cuMemcpyDtoDAsync_v2(self, to, source, size, stream):
        return 0

    def cuModuleLoadData(self, module, image):
        assert image.value.startswith(b"//")
        return 0

    def cuModuleGetFunction(self, function, module, name):
        self.kernels.append(name.value.decode())
        function._obj.value = len(self.kernels)
        return 0

    def cuLaunchKernel(self, function, x, y, z, bx, by, bz, shared, stream, arguments, extra):
        assert (z, bx, by, bz, shared) == (1, THREADS, 1, 1, 0)
        name = self.kernels[function.value - 1]
        count = len(arguments) - len(SCALARS) - 1
        pointers = [ctypes.c_uint64.from_address(arguments[i]).value for i in (*range(count), len(arguments) - 1)]
        scalars = [ctypes.c_int.from_address(arguments[i]).value for i in range(count, len(arguments) - 1)]
        (kernel,) = (kernel for kernel in KERNELS if kernel.name == name)
        assert count == len(kernel.arrays)
        sizes = {address: len(block) - 256 for address, block in self.memory.items()}
        ranges = [(address, address + sizes[address], 0) for address in pointers[:-1]]
        exact = np.empty(sizes[pointers[-1]] // 2, np.float32)
        self.failure = self.library.emulate(
            ctypes.cast(self.library[name], ctypes.c_void_p),
            count,
            (ctypes.c_void_p * count)(*pointers[:-1]),
            (ctypes.c_int * 6)(*scalars),
            ctypes.c_void_p(pointers[-1]),
            ctypes.c_void_p(exact.ctypes.data),
            exact.size,
            x,
            y,
            (ctypes.c_int * THREADS)(*FORWARD.tolist()),
            1,
            0,
            (ctypes.c_uint64 * (3 * count))(*(value for row in ranges for value in row)),
            count,
        )
        return 0

    def cuEventCreate(self, event, flags):
        return 0

    def cuEventRecord(self, event, stream):
        return 0

    def cuEventSynchronize(self, event):
        return 0

    def cuEventDestroy_v2(self, event):
        return 0

    def cuEventElapsedTime(self, passed, begin, end):
        passed._obj.value = 2.0
        return 0


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("gpu_kernels")


@pytest.fixture
def driver(request, monkeypatch):
    """Its kernels are not compiled for a GPU, as they run on none."""
    module = importlib.import_module("cuda_driver")
    blob = type("Blob", (), {"ptx": "// not compiled"})
    monkeypatch.setattr(module, "build_kernel", lambda kernel, gpu: blob)
    return Driver(cached_library(request.config))


def test_right_kernels_pass_the_check(benchmark, driver, capsys):
    assert benchmark.main(["--check"], lambda: driver) == 0
    assert "Emulated, sm_89: 128 of 128 right" in capsys.readouterr().out
    assert set(driver.kernels) == {kernel.name for kernel in KERNELS}
    assert not driver.memory


def test_forms_that_the_gpu_has_no_products_for_are_left_out(benchmark, driver, capsys):
    driver.minor = 6
    assert benchmark.main(["--check", "--forms", "fp8", "int8"], lambda: driver) == 0
    assert "Emulated, sm_86: 16 of 16 right" in capsys.readouterr().out
    assert not any(name.endswith("_fp8") for name in driver.kernels)


def test_a_wrong_kernel_fails_the_check_and_is_not_timed(benchmark, driver, capsys, tmp_path):
    """`fp8` codes read as int8."""
    get = driver.cuModuleGetFunction

    def swapped(function, module, name):
        return get(function, module, ctypes.c_char_p(name.value.replace(b"_fp8", b"_int8")))

    driver.cuModuleGetFunction = swapped
    assert benchmark.main(["--forms", "exact", "fp8", "--out", str(tmp_path)], lambda: driver) == 1
    out = capsys.readouterr().out
    assert "32 of 48 right" in out
    assert '"kernel": "gate_up_decode_f16_fp8"' in out
    assert not list(tmp_path.iterdir())


def test_a_kernel_that_reads_past_an_array_is_an_error(benchmark, driver):
    driver.failure = b"an illegal address"
    with pytest.raises(RuntimeError, match=r"cuCtxSynchronize: an illegal address \(700\)"):
        benchmark.CudaGpu(driver)._call("cuCtxSynchronize")


def test_what_was_measured_is_written_with_date_and_hardware(benchmark, driver, tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "cuLaunchKernel", lambda *arguments: 0)  # the check is not the matter here
    monkeypatch.setattr(benchmark, "COPIED", 1 << 20)
    monkeypatch.setattr(benchmark, "check", lambda gpu, forms: [])
    options = ["--tokens", "1", "20", "--forms", "int4", "--hidden", "128", "--ffn", "256", "--experts", "3"]
    assert benchmark.main([*options, "--rounds", "2", "--out", str(tmp_path)], lambda: driver) == 0
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())
    assert found["hardware"] == {"gpu": "Emulated", "architecture": "sm_89", "driver_cuda": "13.0"}
    assert found["date"].endswith("+00:00")
    assert found["peer"] == []
    assert len(found["kernels"]) == 2 * 2 * 2
    first = found["kernels"][0]
    assert first["kernel"] == "gate_up_decode_f16_int4"
    # three launches in the fake's two milliseconds; 512 rows of 64 bytes and one scale of one expert
    assert first["microseconds"] == pytest.approx(2000 / 3, abs=0.01)
    bandwidth = 2 * (1 << 20) / 2e-3
    assert first["of_copy_bandwidth"] == round(512 * (64 + 4) / (2e-3 / 3) / bandwidth, 3)
    assert not driver.memory


def test_without_a_driver_it_says_so(benchmark, monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(MachineLacks, match=r"no NVIDIA driver: libcuda\.so\.1"):
        benchmark.main(["--check"])


@pytest.mark.parametrize("arguments", [["--forms", "fp4"], ["--tokens", "many"]])
def test_bad_arguments_are_refused(benchmark, arguments):
    with pytest.raises(SystemExit) as exit_code:
        benchmark.parse(arguments)
    assert exit_code.value.code == 2


def test_the_kernels_run_on_a_gpu(benchmark):
    """The check for real, where there is a GPU."""
    try:
        find_nvcc()
        ctypes.CDLL("libcuda.so.1")
    except (MachineLacks, OSError) as lacks:
        pytest.skip(f"needs nvcc and an NVIDIA GPU with its driver: {lacks}")
    assert benchmark.main(["--check"]) == 0
