"""Cutting, saving and restoring a row: on every backend, the row goes on as one that was never touched, bit for bit."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from arriero.errors import ArrieroError
from arriero.export.proof import emulate
from arriero.export.proof.reference import TorchBackend
from arriero.runtimes import cache as kvcache
from arriero.runtimes import tensorrt
from arriero.runtimes.backend import Backend, Cache, Floats, ModelSpec
from arriero.runtimes.cache import KVCache
from arriero.runtimes.integrity import open_manifest
from arriero.runtimes.lazy_memory import lazy_zeros
from arriero.runtimes.nvidia import device_cache, products
from arriero.runtimes.onnxruntime import OrtBackend
from arriero.runtimes.tensorrt import TensorRtBackend
from arriero.runtimes.tvm import TvmBackend
from tests.runtimes.conftest import model_entry, write_graphs
from tests.tensorrt.fake_cuda import FakeCuda
from tests.tensorrt.fake_engine import FakeTensorRt, signature, write_engine
from tests.toys import load_reference, make_scout_toy

TOY = ModelSpec.parse(model_entry())


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> TorchBackend:
    return TorchBackend.of(load_reference(make_scout_toy(tmp_path_factory.mktemp("scout"), 7)))


@pytest.fixture
def open_float(bundle: Path) -> Callable[[], Backend]:
    return lambda: OrtBackend(bundle, TOY, threads=1)


@pytest.fixture
def open_int8(tmp_path: Path) -> Callable[[], Backend]:
    write_graphs(tmp_path, rounds=True)
    return lambda: OrtBackend(tmp_path, TOY, threads=1)


@pytest.fixture
def open_tvm(request: pytest.FixtureRequest) -> Callable[[], Backend]:
    folder = request.getfixturevalue("tvm_workshop") / "bundles" / "fp32"
    return lambda: TvmBackend(folder, open_manifest(folder).model, threads=1)


@pytest.fixture
def open_reference(reference: TorchBackend) -> Callable[[], Backend]:
    return lambda: reference


@pytest.fixture
def gpu_bundle(reference: TorchBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for engines on a stand-in for the GPU, whose memory starts full of NaN and which keeps every fault."""
    gpu = FakeCuda()
    trt = FakeTensorRt("tensorrt_11", gpu, reference.model)
    monkeypatch.setattr(products, "import_module", dict.fromkeys(tensorrt.PRODUCT.modules, trt.module).__getitem__)
    monkeypatch.setattr(tensorrt, "load_cuda", lambda extra: gpu.runtime)
    monkeypatch.setattr(device_cache, "FIRST_SLOTS", 4)
    yield tmp_path
    assert gpu.faults == []
    assert gpu.held == {"memory": 0, "pinned": 0, "handles": 0}


def tensorrt_backend(folder: Path, reference: TorchBackend, cache_type: str, fixed: bool) -> TensorRtBackend:
    """The backend over engines that keep keys and values as `cache_type`, in buffers that grow or are `fixed`."""
    for part in ("embed", "text"):
        write_engine(folder, part, signature(reference.model, part, 3, 80, cache_type, fixed))
    return TensorRtBackend(folder, reference.spec)


@pytest.fixture
def open_growing_tensorrt(gpu_bundle: Path, reference: TorchBackend) -> Callable[[], Backend]:
    return lambda: tensorrt_backend(gpu_bundle, reference, "FLOAT", fixed=False)


@pytest.fixture
def open_fixed_tensorrt(gpu_bundle: Path, reference: TorchBackend) -> Callable[[], Backend]:
    return lambda: tensorrt_backend(gpu_bundle, reference, "BFLOAT16", fixed=True)


@pytest.fixture
def open_emulated(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Backend]:
    """The backend behind a real pipe; this machine's own Python stands for the emulated one."""
    monkeypatch.setattr(emulate, "check_emulation", lambda arch, where: tmp_path)
    monkeypatch.setattr(emulate, "emulated", lambda folder, arguments: [sys.executable, *arguments])
    return lambda: emulate.EmulatedBackend(bundle, TOY, "aarch64")


@pytest.fixture(params=["float", "int8", "tvm", "reference", "growing_tensorrt", "fixed_tensorrt", "emulated"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the toys are too small for more
    monkeypatch.setattr(kvcache, "FIRST_SLOTS", 4)  # so that short tests see the buffers grow
    opened = request.getfixturevalue(f"open_{request.param}")()
    yield opened
    torch.set_num_threads(threads)
    if request.param != "reference":  # shared by the module
        opened.close()


def test_slots_are_added_as_tokens_come_where_the_system_has_no_room_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        if shape[2] > 20:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return lazy_zeros(shape, dtype)

    whole = KVCache(TOY, 2, 64, at_once=True)
    limits = [whole.chunked_limit if layer.attention == "chunked" else 64 for layer in TOY.layers]
    assert [buffer.shape[2] for buffer in whole.keys] == limits
    monkeypatch.setattr(kvcache, "lazy_zeros", refused)
    monkeypatch.setattr(kvcache, "FIRST_SLOTS", 4)
    growing = KVCache(TOY, 2, 64, at_once=True)
    assert {buffer.shape[2] for buffer in (*growing.keys, *growing.values)} == {4}
    growing.lengths[:] = 4
    monkeypatch.setattr(kvcache, "lazy_zeros", lazy_zeros)
    growing.reserve(9)
    assert growing.keys[limits.index(64)].shape[2] == 16


Same = Callable[[Any, Any], bool]


@pytest.fixture
def same(request: pytest.FixtureRequest) -> Same:
    """Whether logits are the same bits; the GPU's stand-in sums over every slot there is, so growing moves its last."""
    if request.node.callspec.params["backend"] == "growing_tensorrt":
        return lambda ours, theirs: bool(np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max())
    return np.array_equal


def draw(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 150, count)


def read(backend: Backend, cache: Cache, ids: np.ndarray) -> list[Floats]:
    """Read `ids` into a cache of one row, in pieces inside chunks; gives the logits of every piece's last token."""
    chunk, logits = backend.spec.attention_chunk_size, []
    while len(ids):
        at = int(cache.lengths[0])
        piece = ids[None, : chunk - at % chunk]
        embeds = backend.embed(piece, np.zeros((0, backend.spec.hidden_size), np.float32))
        positions, last = np.arange(at, at + piece.shape[1])[None], np.array([piece.shape[1] - 1])
        logits.append(backend.forward(embeds, positions, cache, last).logits[0, 0])
        ids = ids[piece.shape[1] :]
    return logits


def decode(backend: Backend, cache: Cache) -> np.ndarray:
    """The logits of a few tokens more than a chunk, one by one."""
    count = backend.spec.attention_chunk_size + 2
    return np.stack([read(backend, cache, draw(1, 50 + number))[0] for number in range(count)])


def lengths(chunk: int) -> list[tuple[int, int]]:
    """Pairs of a row's length and a shorter one that it may be cut to."""
    inside, edges = 2 * chunk + 5, (2 * chunk, chunk, 0)
    return [(inside, 2 * chunk + 2), (inside, inside), *((inside, edge) for edge in edges), (2 * chunk, chunk)]


@pytest.mark.parametrize("number", range(6))
def test_a_row_cut_short_goes_on_as_a_fresh_one(backend: Backend, same: Same, number: int) -> None:
    chunk = backend.spec.attention_chunk_size
    length, shorter = lengths(chunk)[number]
    ids = draw(length)
    fresh, cache = backend.new_cache(1, 5 * chunk), backend.new_cache(2, 5 * chunk)
    read(backend, fresh, ids[:shorter])
    read(backend, cache.rows(0, 1), draw(chunk + 1, 9))
    row = cache.rows(1, 2)
    read(backend, row, ids[:shorter])
    read(backend, row, ids[shorter:])
    row.truncate(0, shorter)
    assert cache.lengths.tolist() == [chunk + 1, shorter]
    assert same(decode(backend, row), decode(backend, fresh))


@pytest.mark.parametrize(
    ("length", "shorter", "sentence"),
    [
        ((2, 5), (1, 3), r"overwritten; expected a length from \d+ to \d+, or a multiple of \d+\. Restore a snapshot"),
        ((2, 0), (2, -1), "overwritten; expected"),  # the row's next chunk is the current one
        ((2, 5), (2, 6), r"cannot be truncated to \d+; expected a length from 0 to"),
        ((1, 0), (0, -1), "cannot be truncated to -1; expected a length from 0 to"),
    ],
)
def test_a_cut_into_overwritten_slots_is_refused(
    backend: Backend, same: Same, length: tuple[int, int], shorter: tuple[int, int], sentence: str
) -> None:
    chunk = backend.spec.attention_chunk_size
    count, cut = (chunks * chunk + more for chunks, more in (length, shorter))
    caches = [backend.new_cache(1, 5 * chunk) for _ in range(2)]
    for cache in caches:
        read(backend, cache, draw(count))
    with pytest.raises(ArrieroError, match=sentence):
        caches[0].truncate(0, cut)
    assert caches[0].lengths.tolist() == [count]
    assert same(*(decode(backend, cache) for cache in caches))


def held_bytes(spec: ModelSpec, length: int, item: int) -> int:
    """What keys and values take that the next token may see."""
    slots = [length % spec.attention_chunk_size if layer.attention == "chunked" else length for layer in spec.layers]
    return 2 * sum(slots) * spec.num_key_value_heads * spec.head_dim * item


@pytest.mark.parametrize("more", [5, 0], ids=["inside a chunk", "at its edge"])
def test_a_snapshot_restores_into_any_row_of_any_cache(backend: Backend, same: Same, more: int) -> None:
    spec, chunk = backend.spec, backend.spec.attention_chunk_size
    ids = draw(2 * chunk + more)
    cache, untouched = backend.new_cache(3, 5 * chunk), backend.new_cache(1, 5 * chunk)
    read(backend, untouched, ids)
    read(backend, cache.rows(1, 2), ids)
    saved = cache.rows(1, 3).snapshot(0)
    assert saved.length == len(ids)
    assert saved.nbytes == held_bytes(spec, len(ids), saved.keys[0].itemsize)
    held = [buffer.copy() for buffer in (*saved.keys, *saved.values)]
    expected = decode(backend, untouched)

    assert same(decode(backend, cache.rows(1, 2)), expected)  # the chunk's slots are overwritten now
    read(backend, cache.rows(0, 1), draw(chunk + 3, 8))
    cache.copy_row(0, 1)
    cache.rows(1, 3).restore(0, saved)  # where it came from, over another row
    cache.restore(2, saved)  # into an empty row
    other = backend.new_cache(1, len(ids) + chunk + 2)  # into another cache, full to its last slot in the end
    other.restore(0, saved)
    assert cache.lengths.tolist() == [chunk + 3, len(ids), len(ids)]
    for row in (cache.rows(1, 2), cache.rows(2, 3), other):
        assert same(decode(backend, row), expected)
    assert all(map(np.array_equal, held, (*saved.keys, *saved.values)))


def test_a_row_restored_at_an_edge_cannot_be_cut_into_the_chunk_before(backend: Backend, same: Same) -> None:
    chunk = backend.spec.attention_chunk_size
    cache, other = (backend.new_cache(1, 5 * chunk) for _ in range(2))
    read(backend, cache, draw(2 * chunk))
    other.restore(0, cache.snapshot(0))
    with pytest.raises(ArrieroError, match="overwritten"):
        other.truncate(0, 2 * chunk - 1)
    for row in (cache, other):
        row.truncate(0, chunk)
    assert same(decode(backend, other), decode(backend, cache))


def test_an_empty_row_can_be_saved_and_restored(backend: Backend, same: Same) -> None:
    cache = backend.new_cache(1, 5 * backend.spec.attention_chunk_size)
    saved = cache.snapshot(0)
    assert (saved.length, saved.nbytes) == (0, 0)
    expected = decode(backend, cache)
    cache.restore(0, saved)
    assert cache.lengths.tolist() == [0]
    assert same(decode(backend, cache), expected)


def test_a_snapshot_that_does_not_fit_is_refused_and_changes_nothing(backend: Backend, same: Same) -> None:
    chunk = backend.spec.attention_chunk_size
    cache, target, untouched = (backend.new_cache(1, count * chunk) for count in (3, 2, 2))
    read(backend, cache, draw(2 * chunk + 1))
    saved = cache.snapshot(0)
    for row in (target, untouched):
        read(backend, row, draw(chunk - 3, 4))
    coarse = tuple(buffer.astype(np.float64) for buffer in saved.keys)
    refusals: dict[str, Any] = {
        f"{2 * chunk + 1} tokens do not fit a cache of {2 * chunk}": saved,
        "the snapshot is of another model": replace(saved, spec=replace(saved.spec, num_attention_heads=1)),
        "the snapshot holds float64 and the cache": replace(saved, keys=coarse),
    }
    for sentence, snapshot in refusals.items():
        with pytest.raises(ArrieroError, match=sentence):
            target.restore(0, snapshot)
    assert target.lengths.tolist() == [chunk - 3]
    last = draw(2, 5)
    assert same(read(backend, target, last)[-1], read(backend, untouched, last)[-1])


def test_a_snapshot_at_an_edge_is_the_global_layers_alone(reference: TorchBackend) -> None:
    """Three layers of four are chunked, as in the released models: three quarters of the bytes are spared."""
    chunk = reference.spec.attention_chunk_size
    cache = reference.new_cache(1, 3 * chunk)
    read(reference, cache, draw(2 * chunk))
    saved = cache.snapshot(0)
    kinds = [layer.attention for layer in reference.spec.layers]
    assert [key.shape[1] for key in saved.keys] == [2 * chunk if kind == "global" else 0 for kind in kinds]
    assert 4 * saved.nbytes == 2 * len(kinds) * 2 * chunk * reference.spec.num_key_value_heads * 4 * (
        reference.spec.head_dim
    )
