"""The GPU benchmark's command over a driver that runs the kernels in the emulation. No speed is measured here."""

from __future__ import annotations

import ctypes
import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from arriero.errors import MachineLacks
from arriero.export.compile.cuda.build_cuda_kernels import find_nvcc
from arriero.export.compile.cuda.launch import KERNELS, SCALARS
from tests.benchmarks.bare_packages import link_bare_packages
from tests.cuda_emulator import cached_library

FOLDER = Path(__file__).parents[2] / "benchmarks"
NAMED = {kernel.name: kernel for kernel in KERNELS}


class Driver:
    """NVIDIA's driver as far as the benchmark calls it: device memory is the host's, a launch is emulated."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.emulate.restype = ctypes.c_char_p
        self.memory: dict[int, np.ndarray] = {}
        self.kernels: list[str] = []
        self.captured: list | None = None
        self.graphs: dict[int, list] = {}
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

    def cuStreamCreate(self, stream, flags):
        stream._obj.value = 1
        return 0

    def cuDeviceGetPCIBusId(self, address, size, device):
        address.value = b"0000:01:00.0"
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
        value._obj.value = {75: 8, 76: self.minor, 16: 3}[attribute]
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
        assert image.value == b"not compiled"
        module._obj.value = 1
        return 0

    def cuModuleGetFunction(self, function, module, name):
        self.kernels.append(name.value.decode())
        function._obj.value = len(self.kernels)
        return 0

    def cuLaunchKernel(self, function, x, y, z, bx, by, bz, shared, stream, arguments, extra):
        """Take a copy of the arguments, as the driver does, and run now or when the graph is replayed."""
        assert (z, by, bz, shared, stream.value, extra) == (1, 1, 1, 0, 1, None)
        name = self.kernels[function.value - 1]
        wide = {"read_probe": [0, 1, 2]}.get(name, [*range(len(arguments) - len(SCALARS) - 1), len(arguments) - 1])
        values = [
            (ctypes.c_uint64 if i in wide else ctypes.c_int).from_address(arguments[i]).value
            for i in range(len(arguments))
        ]
        assert bx == (256 if name == "read_probe" else NAMED[name].threads)
        if self.captured is not None:
            self.captured.append((name, x, y, values))
            return 0
        return self.emulate(name, x, y, values)

    def cuStreamBeginCapture_v2(self, stream, mode):
        self.captured = []
        return 0

    def cuStreamEndCapture(self, stream, graph):
        self.graphs[len(self.graphs) + 1] = self.captured
        graph._obj.value, self.captured = len(self.graphs), None
        return 0

    def cuGraphInstantiateWithFlags(self, executable, graph, flags):
        executable._obj.value = graph.value
        return 0

    def cuGraphDestroy(self, graph):
        return 0

    def cuGraphExecDestroy(self, graph):
        self.graphs[graph.value] = []
        return 0

    def cuGraphLaunch(self, graph, stream):
        assert self.graphs[graph.value], "an empty or dropped graph"
        for launch in self.graphs[graph.value]:
            self.emulate(*launch)
        return 0

    def emulate(self, name, x, y, values):
        if name == "read_probe":
            address, quads, out = values
            assert 16 * quads <= len(self.memory[address]) - 256
            assert quads % 2048 == 0
            assert out in self.memory
            return 0
        count = len(values) - len(SCALARS) - 1
        pointers, scalars = [*values[:count], values[-1]], values[count:-1]
        kernel = NAMED[name]
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
            (ctypes.c_int * kernel.threads)(*range(kernel.threads)),
            kernel.threads,
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
    """The command, its long and released shapes cut down to what an emulation has time for, its copies to nothing."""
    monkeypatch.syspath_prepend(FOLDER)
    check, timing, driver = (importlib.import_module(name) for name in ("gpu_check", "gpu_timing", "cuda_driver"))
    monkeypatch.setattr(check, "LONG", [("exact", 0, 1040, 16)])
    monkeypatch.setattr(check, "RELEASED", [("fp8", 0, 16, 288)])
    monkeypatch.setattr(timing, "READ", 1 << 20)
    monkeypatch.setattr(driver, "HELD", 1 << 10)
    return importlib.import_module("gpu_kernels")


@pytest.fixture
def driver(request, benchmark, monkeypatch):
    """Its kernels are not compiled for a GPU, as they run on none."""
    monkeypatch.setattr(benchmark, "code_for", lambda gpu, folder: b"not compiled")
    return Driver(cached_library(request.config))


def test_right_kernels_pass_the_check(benchmark, driver, capsys):
    assert benchmark.main(["--check"], lambda: driver) == 0
    assert "Emulated, sm_89: 268 of 268 right" in capsys.readouterr().out
    assert set(driver.kernels) == {kernel.name for kernel in KERNELS}
    assert not driver.memory


def test_forms_that_the_gpu_has_no_products_for_are_left_out(benchmark, driver, capsys):
    driver.minor = 6
    assert benchmark.main(["--check", "--forms", "fp8", "int8", "--cases", "odd"], lambda: driver) == 0
    assert "Emulated, sm_86: 24 of 24 right" in capsys.readouterr().out
    assert not any(name.endswith("_fp8") for name in driver.kernels)


def test_a_wrong_kernel_fails_the_check_and_is_not_timed(benchmark, driver, capsys, tmp_path):
    """`fp8` codes read as int8."""
    get = driver.cuModuleGetFunction

    def swapped(function, module, name):
        return get(function, module, ctypes.c_char_p(name.value.replace(b"_fp8", b"_int8")))

    driver.cuModuleGetFunction = swapped
    assert benchmark.main(["--forms", "exact", "fp8", "--out", str(tmp_path)], lambda: driver) == 1
    out = capsys.readouterr().out
    assert "72 of 100 right" in out
    assert '"kernel": "gate_up_decode_f16_fp8"' in out
    assert not list(tmp_path.iterdir())


def test_a_kernel_that_reads_past_an_array_is_an_error(benchmark, driver):
    driver.failure = b"an illegal address"
    with pytest.raises(RuntimeError, match=r"cuCtxSynchronize: an illegal address \(700\)"):
        benchmark.CudaGpu(driver, lambda gpu: b"")._call("cuCtxSynchronize")


def test_what_was_measured_is_written_with_date_and_hardware(benchmark, driver, tmp_path, capsys):
    """Of two runs, and what was timed is compared: the fake's clock stands, its kernels run."""
    shape = ["--tokens", "1", "5", "--hidden", "128", "--ffn", "128", "--experts", "3"]
    options = ["--time", "--no-peers", "--rounds", "1", "--runs", "2", "--out", str(tmp_path)]
    assert benchmark.main([*shape, *options], lambda: driver) == 0
    (path,) = tmp_path.iterdir()
    report = json.loads(path.read_text())
    assert report["hardware"] == {"gpu": "Emulated", "architecture": "sm_89", "driver_cuda": "13.0"}
    assert report["date"].endswith("+00:00")
    assert (report["peers"], report["checked"]) == ([], [])
    rows = {(row["kernel"], row["tokens"]): row for row in report["kernels"]}
    assert len(rows) == len(report["kernels"]) == 4 * 2 * 2 * 2
    assert all(row["right"] and 0 < row["error"] < 1e-3 for row in rows.values())
    row = rows["gate_up_decode_f16_int4", 1]
    # three launches in the fake's two milliseconds; 256 rows of 64 bytes and one scale of one expert
    assert row["microseconds"] == row["best"] == pytest.approx(2000 / 3, abs=0.01)
    assert (row["runs"], row["spread"], row["sm_mhz"]) == ([row["microseconds"]] * 2, 0, None)
    bandwidth = 4 * (1 << 20) / 2e-3
    assert row["of_read_bandwidth"] == round(256 * (64 + 4) / (2e-3 / 3) / bandwidth, 3)
    assert not driver.memory
    assert not any(driver.graphs.values())


def test_a_timed_launch_that_was_wrong_is_named(benchmark, driver, tmp_path, capsys):
    """An expert is read that the tokens did not choose."""
    emulate = driver.emulate

    def one_expert(name, x, y, values):
        return emulate(name, x, y, values if name == "read_probe" else [*values[:6], 1, *values[7:]])

    driver.emulate = one_expert
    shape = ["--tokens", "3", "--hidden", "128", "--ffn", "256", "--experts", "3", "--forms", "int8", "--ops", "down"]
    options = ["--shapes", "decode", "--time", "--no-peers", "--rounds", "1", "--out", str(tmp_path)]
    assert benchmark.main([*shape, *options], lambda: driver) == 1
    assert "timed launches were wrong: down_decode_f16_int8" in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["kn", "nk"])
def test_peers_multiply_each_token_with_its_expert(benchmark, layout):
    """On torch's CPU: the calls are those that a GPU gets."""
    peers = importlib.import_module("gpu_peers")
    for make, kind, layouts, spare in peers.PEERS.values():
        if layout not in layouts:
            continue
        weights = peers.stack(torch, layout, 3, 32, 64, getattr(torch, kind), "cpu")
        assert weights.is_contiguous() == (layout == "kn")
        x = torch.randn(5 + 3 * spare, 32).to(getattr(torch, kind))
        run = make(torch, x, weights)
        for first in range(3):
            experts = sorted((token + first) % 3 for token in range(5))
            expected = torch.stack([x[i].float() @ weights[expert].float() for i, expert in enumerate(experts)])
            torch.testing.assert_close(torch.cat(run(first)).float(), expected, rtol=1e-2, atol=1e-2)


def test_runs_that_a_peer_refused_have_no_spread(benchmark):
    timing = importlib.import_module("gpu_timing")
    rows = timing.over_runs([[{"microseconds": 10.0}, {"refused": "no"}], [{"microseconds": 11.0}, {"refused": "no"}]])
    assert rows == [{"microseconds": 11.0, "runs": [10.0, 11.0], "spread": 0.1}, {"refused": "no"}]


def test_a_bare_machine_needs_numpy_and_ml_dtypes_alone(tmp_path):
    """Of packages; the checkout's folder has another name, and another project's `tests` is installed."""
    link_bare_packages(tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "__init__.py").write_text("raise RuntimeError('not these')\n")
    (tmp_path / "checkout").symlink_to(FOLDER.parent)
    command = [sys.executable, "-S", "benchmarks/gpu_kernels.py", "--check", "--code", str(tmp_path)]
    environment = {"PYTHONPATH": str(tmp_path), "PATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path / "checkout", env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    # with a GPU: the folder without code
    assert done.stderr.startswith(("there is no NVIDIA driver: ", f"{tmp_path} has no machine code for sm_"))


def test_code_that_was_carried_along_is_taken(benchmark, tmp_path):
    code = importlib.import_module("gpu_code")
    with pytest.raises(MachineLacks, match=r"has no machine code for sm_90; expected sm_90\.cubin or sm_90\.ptx"):
        code.code_for("sm_90", tmp_path)
    (tmp_path / "sm_90.ptx").write_bytes(b"text")
    assert code.code_for("sm_90", tmp_path) == b"text"
    (tmp_path / "sm_90.cubin").write_bytes(b"machine code")
    assert code.code_for("sm_90", tmp_path) == b"machine code"


def test_code_is_compiled_for_another_machine(benchmark, tmp_path, monkeypatch):
    """With the probe among its kernels; without a folder the same code is compiled at once."""
    try:
        find_nvcc()
    except MachineLacks as lacks:
        pytest.skip(f"needs nvcc: {lacks}")
    code = importlib.import_module("gpu_code")
    monkeypatch.setattr(code, "kernels_for", lambda gpu: KERNELS[:1])
    assert code.main([str(tmp_path), "sm_80"]) == 0
    cubin, ptx, words = ((tmp_path / f"sm_80.{kind}") for kind in ("cubin", "ptx", "txt"))
    assert ".visible .entry read_probe(" in ptx.read_text()
    assert ptx.read_text().count(".entry ") == 2
    assert " 0 bytes spill stores" in words.read_text()
    assert cubin.read_bytes() == code.code_for("sm_80", None)


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
