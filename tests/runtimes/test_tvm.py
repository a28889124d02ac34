"""The TVM backend over bundles that the real command built: parity, memory, threads, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import arriero
from arriero.errors import ArrieroError, MachineLacks
from arriero.export.compile import no_watch
from arriero.export.machine.memory_watch import MemoryWatch, release_memory
from arriero.export.proof.prove import prove_bundle
from arriero.runtimes import cache as kvcache
from arriero.runtimes import cpu
from arriero.runtimes import tvm_graph as runtime
from arriero.runtimes.cpu import usable_cores
from arriero.runtimes.integrity import open_manifest
from arriero.runtimes.manifest import Manifest
from arriero.runtimes.tvm import TvmBackend
from arriero.runtimes.weight_files import MappedWeights
from tests.runtimes.conftest import seal
from tests.small import CHUNK


@pytest.fixture
def bundles(tvm_workshop: Path) -> Path:
    return tvm_workshop / "bundles"


@pytest.fixture
def backend(bundles: Path) -> TvmBackend:
    return TvmBackend(bundles / "fp32", open_manifest(bundles / "fp32").model, threads=1)


def read(backend, cache, ids, captures=False):
    found = backend.embed(ids, np.zeros((0, backend.spec.hidden_size), np.float32))
    positions = cache.lengths[:, None] + np.arange(ids.shape[1])
    return backend.forward(found, positions, cache, np.arange(ids.shape[1]), captures)


def draw(count, seed=0):
    return np.random.default_rng(seed).integers(0, 500, (1, count))


def test_the_exact_bundle_agrees_with_the_reference_in_text_and_images(bundles):
    rows = {row["metric"]: row["value"] for row in json.loads((bundles / "fp32" / "parity.json").read_text())["rows"]}
    assert rows["router_agreement"] == rows["same_top_token"] == 1.0
    assert rows["logits_max_abs_error"] < 1e-4


def test_rounding_and_routing_are_told_apart_by_the_record_and_the_exact_bundle(bundles):
    exact, rounded = (
        {row.metric: row.value for row in prove_bundle(bundles / name, [], no_watch, None, True, other)[None].rows}
        for name, other in (("fp32", None), ("int8", bundles / "fp32"))
    )
    assert exact["logits_kl_forced_routing"] < 1e-9
    assert 0 < rounded["logits_kl_forced_routing"] <= rounded["logits_kl_mean"] * 1.01  # few tokens go elsewhere
    assert 0 <= rounded["logits_kl_candidate_routing"] <= rounded["logits_kl_mean"]


def test_closing_gives_the_memory_of_steps_back(backend):
    def held():
        release_memory()
        with MemoryWatch() as watch:
            pass
        return watch.start

    before = held()
    backend.embed(draw(1 << 18), np.zeros((0, backend.spec.hidden_size), np.float32))
    kept = held() - before
    backend.close()
    assert kept > 16 << 20
    assert held() - before < kept / 3  # of which a thread keeps what its own operators worked in


def test_int8_computes_what_onnxruntime_computes(bundles, workshop):
    ids = draw(40)[0]
    ours, theirs = (
        arriero.load(folder / "int8", threads=1).logits(ids).logits for folder in (bundles, workshop / "bundles")
    )
    exact = arriero.load(bundles / "fp32", threads=1).logits(ids).logits
    # The same integers, and activations rounded in the same blocks; what is left is float32's order of summation, and
    # a value here and there that it rounds to the neighbouring integer.
    apart, rounding = (np.abs(ours - other).mean() for other in (theirs, exact))
    assert apart < 0.05 * rounding


def test_steps_write_into_the_same_memory_and_touch_only_their_slots(backend):
    cache = backend.new_cache(1, 8)
    cache.store.reserve(8)
    keys, values = cache.store.layer(3)
    address = keys.ctypes.data
    read(backend, cache, draw(3))
    held = keys[:, :, :3].copy()
    assert np.all(held != 0)
    assert not keys[:, :, 3:].any()
    assert not values[:, :, 3:].any()
    read(backend, cache, draw(1))
    assert cache.store.layer(3)[0].ctypes.data == address
    assert np.array_equal(keys[:, :, :3], held)
    assert np.all(keys[:, :, 3] != 0)
    assert cache.lengths.tolist() == [4]


def test_rows_lie_as_far_apart_as_the_longest_context_and_take_their_own_memory(backend):
    """No slot is ever moved, and the third row begins beyond 2^32 elements."""
    far, near, ids = backend.new_cache(3, 1 << 27), backend.new_cache(1, 64), draw(40)
    keys, _ = far.store.layer(3)
    assert keys[0].size > 1 << 31
    with MemoryWatch() as watch:
        same = read(backend, far.rows(2, 3), ids).logits
        assert np.array_equal(same, read(backend, near, ids).logits)
    assert watch.peak - watch.start < 64 << 20
    assert far.store.layer(3)[0].ctypes.data == keys.ctypes.data
    far.truncate(2, 0)
    assert not keys[2, :, :64].any()


def test_a_step_without_taps_gives_the_same_logits(backend):
    with_taps = read(backend, backend.new_cache(1, 8), draw(8), captures=True)
    without = read(backend, backend.new_cache(1, 8), draw(8))
    assert np.array_equal(without.logits, with_taps.logits)
    assert not without.hiddens
    assert not without.expert_ids
    assert sorted(with_taps.hiddens) == sorted(with_taps.expert_ids) == [0, 1, 2, 3]


def test_results_do_not_depend_on_the_number_of_threads(bundles, backend):
    several = TvmBackend(bundles / "fp32", backend.spec, threads=3)
    one, three = (read(side, side.new_cache(1, 60), draw(60)).logits for side in (backend, several))
    assert np.array_equal(one, three)


def test_every_thread_asked_for_is_one_of_the_pool(bundles):
    """TVM's own choice, every second processor, would run two threads' work on one."""
    cores = usable_cores()
    script = f"""
import arriero, tvm_ffi
with arriero.load({str(bundles / "int8")!r}, threads={cores}) as session:
    session.generate("What is 17 + 25?", max_tokens=1)
    print(tvm_ffi.get_global_func("runtime.NumThreads")())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(cores)]


def test_two_sessions_and_four_threads_answer_as_alone(bundles):
    sessions = [arriero.load(bundles / "int8", threads=threads) for threads in (1, 2)]
    image = np.random.default_rng(3).integers(0, 255, (32, 32, 3), np.uint8)
    cases = [(f"case {i}", [image] if i % 3 == 0 else []) for i in range(8)]

    def answer(number):
        text, images = cases[number]
        settings = {"max_tokens": 20, "temperature": 0.7, "seed": number}
        return sessions[number % 2].generate(text, images, **settings).token_ids

    alone = [answer(number) for number in range(len(cases))]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(answer, range(len(cases)))) == alone
    assert len({tuple(tokens) for tokens in alone}) == len(cases)


def test_steps_outside_the_agreement_are_refused(backend, monkeypatch):
    monkeypatch.setattr(kvcache, "FIRST_SLOTS", 4)
    with pytest.raises(ValueError, match="one token per row"):
        read(backend, backend.new_cache(2, 32), draw(4).reshape(2, 2))
    with pytest.raises(ValueError, match="one attention chunk"):
        read(backend, backend.new_cache(1, 2 * CHUNK), draw(CHUNK + 1))
    with pytest.raises(ArrieroError, match="do not fit a cache of 4"):
        read(backend, backend.new_cache(1, 4), draw(5))


def test_a_bundle_runs_without_compiler_or_heavy_libraries(bundles):
    script = f"""
import sys
import arriero
with arriero.load({str(bundles / "int8")!r}, threads=1) as session:
    print(len(session.generate("What is 17 + 25?", max_tokens=3).token_ids))
print(sorted({{"tvm", "torch", "onnx", "onnxruntime"}} & set(sys.modules)))
print(any("tvm_compiler" in line for line in open("/proc/self/maps")))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["3", "[]", "False"]


def test_weights_are_mapped_where_they_lie(bundles):
    """No matrix of an exact bundle is copied, and no record; what is copied are vectors and biases."""
    signature = json.loads((bundles / "fp32" / "text.json").read_text())
    files = MappedWeights(bundles / "fp32")
    matrices = [entry for entry in signature["weights"] if len(entry["shape"]) > 1]
    assert not any(entry["aligned"] for entry in matrices)
    for entry in matrices:
        address = files.weight(entry).ctypes.data
        assert any(start <= address < stop for start, stop in mappings(bundles / "fp32" / entry["file"]))
    for entry in signature["experts"]:
        table = files.table(entry)
        assert table[0] == 0
        for address, (name, _) in zip(table[1:], entry["records"], strict=True):
            assert address % 4096 == 0
            assert any(start <= address < stop for start, stop in mappings(bundles / "fp32" / name))


def mappings(file):
    """Where this process has `file` mapped."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(file))]
    return [tuple(int(address, 16) for address in line[0].split("-")) for line in lines]


def edited(bundle: Path, folder: Path, **target: object) -> Path:
    """A copy of a bundle whose manifest says something else of its target, and is sealed again."""
    shutil.copytree(bundle, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["target"] |= target
    seal(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_a_processor_that_lacks_a_feature_is_refused_with_its_name(bundles, tmp_path, monkeypatch):
    recorded = open_manifest(bundles / "fp32").target.features
    assert recorded
    monkeypatch.setattr(cpu, "cpu_features", lambda: frozenset(recorded[1:]))
    with pytest.raises(MachineLacks, match=rf"a processor with {recorded[0]}, which this one lacks.*cpu: native"):
        arriero.load(bundles / "fp32")


def test_another_architecture_is_refused(bundles, tmp_path):
    folder = edited(bundles / "fp32", tmp_path / "other", arch="riscv64")
    with pytest.raises(MachineLacks, match="built for riscv64"):
        arriero.load(folder)


def test_a_library_that_is_none_is_refused(bundles, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(bundles / "fp32", folder)
    (folder / "text.so").unlink()
    (folder / "text.so").write_bytes(b"no library")
    with pytest.raises(ArrieroError, match=r"text\.so: TVM's runtime refuses the library.*arriero build"):
        TvmBackend(folder, Manifest.read(folder).model, 1)


def test_weights_outside_the_bundle_are_refused(bundles, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(bundles / "fp32", folder)
    described = json.loads((folder / "text.json").read_text())
    described["weights"][0]["file"] = "../fp32/weights/text-00001.safetensors"
    (folder / "text.json").write_text(json.dumps(described))
    with pytest.raises(ArrieroError, match=r"text\.so: .*'\.\./fp32/.*', outside the bundle"):
        TvmBackend(folder, Manifest.read(folder).model, 1)


def test_weights_larger_than_memory_are_mapped_without_memory_set_aside(bundles, tmp_path, backend):
    """The system would refuse a mapping that it has to keep memory for."""
    folder = tmp_path / "large"
    shutil.copytree(bundles / "fp32", folder)
    weights = folder / json.loads((folder / "text.json").read_text())["weights"][0]["file"]
    weights.chmod(0o644)
    os.truncate(weights, 2 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))  # holes, which take no disk
    ids = np.arange(3, 9)[None]
    steps = [
        read(one, one.new_cache(1, 16), ids).logits for one in (backend, TvmBackend(folder, backend.spec, threads=1))
    ]
    assert np.array_equal(*steps)


@pytest.mark.parametrize(("gone", "package"), [("tvm", "apache-tvm"), ("tvm_ffi", "apache-tvm-ffi")])
def test_a_missing_package_is_named(bundles, backend, monkeypatch, gone, package):
    real = runtime.find_spec
    monkeypatch.setattr(runtime, "find_spec", lambda name: None if name == gone else real(name))
    with pytest.raises(MachineLacks, match=rf"{package} is not installed.*pip install 'arriero\[tvm\]'"):
        TvmBackend(bundles / "fp32", backend.spec, 1)
