"""The doctor on NVIDIA's products: each lack is told apart from the others, with the way to get what is missing."""

from __future__ import annotations

import ctypes
import types

import pytest

from arriero.errors import MachineLacks
from arriero.export.machine import doctor, gpu_checks
from arriero.export.machine.doctor import diagnose
from arriero.runtimes import tensorrt, tensorrt_rtx

PRODUCTS = {"tensorrt": tensorrt.PRODUCT, "tensorrt-rtx": tensorrt_rtx.PRODUCT}
VERSIONS = {
    "tensorrt": "10.16.1.11",
    "tensorrt_rtx_cu13_bindings": "1.7.1.116",
    "onnxruntime-ep-nv-tensorrt-rtx-cu13": "0.5.0",
    "cuda-bindings": "13.0.3",
}


class Driver:
    """A driver library that answers as libcuda does, through pointers, under NVIDIA's names."""

    def __init__(self, *capabilities: int, cuda: int = 12080) -> None:
        self.capabilities, self.cuda = capabilities, cuda

    def cuDriverGetVersion(self, to):
        to._obj.value = self.cuda
        return 0

    def cuInit(self, flags):
        return 0 if self.capabilities else 100

    def cuDeviceGetCount(self, to):
        to._obj.value = len(self.capabilities)
        return 0

    def cuDeviceGet(self, to, number):
        to._obj.value = number
        return 0

    def cuDeviceGetAttribute(self, to, attribute, device):
        to._obj.value = divmod(self.capabilities[device.value], 10)[attribute - 75]
        return 0

    def cuDeviceGetName(self, to, size, device):
        to.value = f"card {device.value}".encode()
        return 0

    def cuDeviceTotalMem_v2(self, to, device):
        assert isinstance(to._obj, ctypes.c_size_t)
        to._obj.value = 24 << 30
        return 0


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Diagnose a machine with a driver (or None), packages, and libraries of some version (or an error) that load."""

    def look(backend, driver, library="10.16.1.11", **versions):
        packages = VERSIONS | versions
        real = doctor.version_of
        monkeypatch.setattr(doctor, "version_of", lambda name: packages.get(name, real(name)))
        monkeypatch.setattr(gpu_checks, "open_driver", lambda: driver)

        def load(self):
            if isinstance(library, Exception):
                raise library
            return types.SimpleNamespace(__version__=library)

        monkeypatch.setattr(type(PRODUCTS[backend]), "load", load)
        found = diagnose(tmp_path, backend)
        return found, {check.name: check for check in found.backends[backend]}

    return look


def test_a_whole_machine(machine):
    found, checks = machine("tensorrt", Driver(89))
    assert (found.can("build", "tensorrt"), found.can("run", "tensorrt")) == (True, True)
    assert checks["GPU"].found == "card 0, sm_89, 24 GiB"
    assert checks["NVIDIA driver"].found == "for CUDA 12.8 and older"
    assert checks["TensorRT loads"].found == "10.16.1.11"


@pytest.mark.parametrize(("backend", "builds"), [("tensorrt", False), ("tensorrt-rtx", True)])
def test_a_machine_without_driver_builds_for_rtx_alone(machine, backend, builds):
    found, checks = machine(backend, None, "1.7.1.116" if "rtx" in backend else "11.4.0.106")
    assert (found.can("build", backend), found.can("run", backend)) == (builds, False)
    assert checks["NVIDIA driver"].found == "no libcuda.so.1"
    assert checks["NVIDIA driver"].remedy.startswith("Install NVIDIA's driver")
    assert found.exit_code(backend) == (0 if builds else 3)


@pytest.mark.parametrize(
    ("backend", "driver", "check", "status", "words"),
    [
        ("tensorrt", Driver(), "GPU", "missing", "pass the GPU into the container"),
        ("tensorrt-rtx", Driver(90), "GPU", "missing", "Take the backend tensorrt for it"),
        ("tensorrt", Driver(61), "GPU", "missing", "too old"),
        ("tensorrt-rtx", Driver(61, 120), "GPU", "missing", "Set CUDA_VISIBLE_DEVICES=1"),
        ("tensorrt-rtx", Driver(120, 61), "GPU", "ok", None),
        ("tensorrt", Driver(89, cuda=11040), "NVIDIA driver", "missing", "driver for CUDA 12"),
    ],
)
def test_gpus_and_drivers(machine, backend, driver, check, status, words):
    _, checks = machine(backend, driver)
    assert checks[check].status == status
    assert (words is None) == (checks[check].remedy is None)
    assert words is None or words in checks[check].remedy


@pytest.mark.parametrize(
    ("backend", "version", "status"),
    [
        ("tensorrt", "10.16.0.72", "ok"),
        ("tensorrt", "10.13.3.9", "missing"),
        ("tensorrt", "11.0.0.114", "ok"),
        ("tensorrt", "12.1.0", "missing"),
        ("tensorrt-rtx", "1.7.1.116", "ok"),
        ("tensorrt-rtx", "1.4.0.76", "missing"),
    ],
)
def test_versions_of_the_library(machine, backend, version, status):
    _, checks = machine(backend, Driver(89), version)
    check = checks[f"{PRODUCTS[backend].title} loads"]
    assert (check.found, check.status) == (version, status)
    assert status == "ok" or f"pip install 'arriero[{backend}]'" in check.remedy


def test_a_library_that_does_not_load(machine):
    lack = MachineLacks("TensorRT does not load: libnvinfer.so.11", remedy="Reinstall it")
    found, checks = machine("tensorrt", Driver(89), lack)
    assert checks["TensorRT loads"].found == "TensorRT does not load: libnvinfer.so.11"
    assert found.exit_code("tensorrt") == 3


def test_packages(machine):
    found, checks = machine("tensorrt", Driver(89), **{"cuda-bindings": None})
    assert (found.can("build", "tensorrt"), found.can("run", "tensorrt")) == (True, False)
    assert checks["cuda-bindings"].remedy.startswith("pip install 'arriero[tensorrt]'")
    own = {"tensorrt_rtx_cu13_bindings": None, "onnxruntime-ep-nv-tensorrt-rtx-cu13": None, "tensorrt_rtx": "1.7.1.116"}
    found, checks = machine("tensorrt-rtx", Driver(120), "1.7.1.116", **own)
    assert found.can("run", "tensorrt-rtx")
    assert checks["tensorrt_rtx_cu13_bindings"].found == "tensorrt_rtx 1.7.1.116 instead"
    found, _ = machine("tensorrt-rtx", Driver(120), "1.7.1.116", **own | {"tensorrt_rtx": None})
    assert found.exit_code("tensorrt-rtx") == 3


def test_this_machine_is_told_as_it_is(tmp_path):
    """Whatever is here: nothing raises, and both products are looked at."""
    for backend in PRODUCTS:
        names = {check.name for check in diagnose(tmp_path, backend).backends[backend]}
        assert names >= {"NVIDIA driver", "GPU", f"{PRODUCTS[backend].title} loads", "cuda-bindings"}
