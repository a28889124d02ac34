"""GPUs by name and by capability, and which product builds for which."""

from __future__ import annotations

import pytest

from arriero.errors import ArrieroError, MachineLacks
from arriero.export.compile.nvidia import driver as nvidia_driver
from arriero.export.compile.nvidia import gpus
from arriero.export.compile.nvidia.gpus import NAMED, Gpu, check_product, parse_gpu
from arriero.traits import TRAITS


@pytest.mark.parametrize(
    ("text", "capability"), [("rtx-4090", 89), ("jetson-orin", 87), ("h200", 90), ("sm_120", 120), ("sm_75", 75)]
)
def test_a_gpu_is_named_by_card_or_capability(text: str, capability: int) -> None:
    assert parse_gpu(text) == Gpu(capability)
    assert str(parse_gpu(text)) == f"sm_{capability}"
    assert str(parse_gpu(text)) in parse_gpu(text).description


@pytest.mark.parametrize("text", ["rtx-9999", "sm_88", "sm_1200", "SM_89", ""])
def test_an_unknown_gpu_is_refused_with_those_we_know(text: str) -> None:
    with pytest.raises(ArrieroError, match="there is no GPU") as caught:
        parse_gpu(text)
    assert "rtx-4090" in str(caught.value)
    assert "sm_89" in str(caught.value)


def test_every_named_gpu_has_a_product() -> None:
    assert set(NAMED.values()) <= {capability for traits in TRAITS.values() for capability in traits.gpus}


def test_a_gpu_of_the_other_product_is_refused_with_that_product() -> None:
    check_product("tensorrt-rtx", Gpu(89), "targets[0].gpu")
    with pytest.raises(
        ArrieroError, match=r"targets\[0\]\.gpu: the backend tensorrt-rtx builds no engines.*h200"
    ) as caught:
        check_product("tensorrt-rtx", Gpu(90), "targets[0].gpu")
    assert "Take the backend tensorrt for it" in str(caught.value)


def test_native_is_this_machines_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "local_gpus", lambda: (Gpu(86), Gpu(89)))
    assert parse_gpu("native") == Gpu(86)
    monkeypatch.setattr(gpus, "local_gpus", lambda: ())
    with pytest.raises(MachineLacks, match="no NVIDIA GPU"):
        parse_gpu("native")


class FakeCuda:
    """NVIDIA's driver as far as we ask it: two GPUs, of capabilities 8.9 and 12.0."""

    def cuInit(self, flags: int) -> int:
        return 0

    def cuDeviceGetCount(self, count) -> int:
        count._obj.value = 2
        return 0

    def cuDeviceGet(self, device, number: int) -> int:
        device._obj.value = number
        return 0

    def cuDeviceGetAttribute(self, found, attribute: int, device) -> int:
        found._obj.value = {75: (8, 12), 76: (9, 0)}[attribute][device.value]
        return 0

    def cuDeviceGetName(self, name, size: int, device) -> int:
        name.value = b"card"
        return 0

    def cuDeviceTotalMem_v2(self, size, device) -> int:
        size._obj.value = 24 << 30
        return 0


def test_the_driver_is_asked_for_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia_driver.ctypes, "CDLL", lambda name: FakeCuda())
    gpus.local_gpus.cache_clear()
    try:
        assert gpus.local_gpus() == (Gpu(89), Gpu(120))
    finally:
        gpus.local_gpus.cache_clear()


def test_a_machine_without_a_driver_has_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(nvidia_driver.ctypes, "CDLL", missing)
    gpus.local_gpus.cache_clear()
    try:
        assert gpus.local_gpus() == ()
    finally:
        gpus.local_gpus.cache_clear()
