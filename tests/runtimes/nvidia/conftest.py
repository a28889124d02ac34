"""A bench of stand-ins for the tests of the TensorRT backends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from arriero.export.proof.reference import TorchBackend
from arriero.runtimes.nvidia import device_cache
from tests.tensorrt.bench import BATCH, CONTEXT, PARTS, Bench
from tests.tensorrt.fake_cuda import FakeCuda
from tests.tensorrt.fake_engine import FakeTensorRt, signature, write_engine
from tests.toys import load_reference, make_maverick_toy, make_scout_toy

Setter = Callable[..., Bench]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TorchBackend]:
    folder = tmp_path_factory.mktemp("toys")
    makers: dict[str, Callable[[Path, int], Path]] = {"scout": make_scout_toy, "maverick": make_maverick_toy}
    return {name: TorchBackend.of(load_reference(make(folder / name, 7))) for name, make in makers.items()}


@pytest.fixture
def bench(references, tmp_path, monkeypatch) -> Iterator[Setter]:
    """Set a bench up; at the end, no stand-in may have found a fault."""
    made: list[Bench] = []
    monkeypatch.setattr(device_cache, "FIRST_SLOTS", 4)

    def set_up(
        product: str = "tensorrt_11",
        model: str = "scout",
        cache: str = "FLOAT",
        cuda: str = "cuda_13",
        fixed: bool = False,
    ) -> Bench:
        reference = references[model]
        gpu = FakeCuda(cuda)
        trt = FakeTensorRt(product, gpu, reference.model)
        folder = tmp_path / f"bundle{len(made)}"
        folder.mkdir()
        for part in PARTS if reference.spec.vision else ("embed", "text"):
            write_engine(folder, part, signature(reference.model, part, BATCH, CONTEXT, cache, fixed))
        made.append(Bench(folder, reference, gpu, trt, trt.install(monkeypatch, tmp_path / "cache")))
        return made[-1]

    yield set_up
    assert [fault for one in made for fault in one.cuda.faults] == []
