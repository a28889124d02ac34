"""The compiled graphs, stepped as the runtime steps them, against the torch reference; processors and refusals."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import re
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tvm", reason="needs apache-tvm: pip install 'arriero[tvm]'")

import tvm
from tvm.ir import GlobalVar

from arriero.errors import ArrieroError, MachineLacks
from arriero.export.build_file.model_spec import model_spec
from arriero.export.compile import Device, cpus
from arriero.export.compile.cpus import NAMED, NEEDS, parse_cpu
from arriero.export.compile.relax.import_graph import import_graph
from arriero.export.compile.tvm import compile_graphs, fuse
from arriero.export.proof.reference import TorchBackend
from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.config import ModelConfig
from arriero.graphs.lower.part import Lowering
from arriero.graphs.lower.tvm import lower as lower_graph
from arriero.graphs.trace import trace_embed, trace_text
from arriero.profiles.recipe import load_profile
from arriero.runtimes.tvm import TvmBackend
from tests.toys import make_guard_toy, make_maverick_toy, make_scout_toy

# fp32 on both sides, another order of summation: measured up to 1.5e-6 of logits that reach 5.
TOLERANCE = 1e-5
LENGTH = 50
CUTS = [0, 9, 16, 17, 18, 32, 37, 48, 49, 50]  # no step crosses a chunk of 16

TOYS = {
    "maverick": lambda folder: make_maverick_toy(folder, 2),
    "top-2 and tied": lambda folder: make_scout_toy(
        folder, 3, vision=False, num_experts_per_tok=2, tie_word_embeddings=True
    ),
    "guard": lambda folder: make_guard_toy(folder, 5),
}


def lower(toy: Path, out: Path) -> None:
    """The exact text graph of a toy, lowered into `out`."""
    out.mkdir(parents=True)
    config, checkpoint = ModelConfig.load(toy), Checkpoint.open(toy)
    schemes = load_profile("fp32").assign(checkpoint.tensors)
    for part, trace in (("text", trace_text), ("embed", trace_embed)):
        lower_graph(
            part, trace(config, checkpoint, out.parent / f"{part}.onnx"), Lowering(config, checkpoint, schemes, out)
        )


def called(module: tvm.IRModule, entry: str) -> list[str]:
    """The functions that `entry` of a fused module calls, in order."""
    values = [binding.value for block in module[entry].body.blocks for binding in block.bindings]
    first = [value.args[0] for value in values if getattr(value, "args", None)]
    return [str(name.name_hint) for name in first if isinstance(name, GlobalVar)]


@pytest.fixture(scope="module", params=list(TOYS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, kernels: Path):
    """The compiled backend of a toy, and its reference."""
    folder = tmp_path_factory.mktemp("compiled")
    toy = TOYS[request.param](folder / "toy")
    lower(toy, folder / "out")
    compile_graphs(folder / "out", ["text", "embed"], Device(kernels=kernels))
    spec = model_spec(ModelConfig.load(toy))
    return TvmBackend(folder / "out", spec, threads=2), TorchBackend(toy, text_only=True)


def anonymous_bytes():
    """Memory of this process that no file stands behind."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def mappings(folder):
    """What the system says of each mapping of a file in `folder`; the first line begins with its addresses."""
    told = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.M)
    return [mapping for mapping in told if str(folder) in mapping.split("\n", 1)[0]]


def mapped_bytes(folder):
    """Bytes of the files in `folder` that this process has in memory."""
    return sum(1024 * int(re.search(r"^Rss:\s+(\d+)", mapping, re.M)[1]) for mapping in mappings(folder))


def map_no_more_than_is_touched(folder):
    """Have the system read and map single pages of `folder`: it takes up to 2 MB around one, as its memory allows."""
    for mapping in mappings(folder):
        start, stop = (int(address, 16) for address in re.match(r"([0-9a-f]+)-([0-9a-f]+)", mapping).groups())
        told = ctypes.CDLL(None, use_errno=True).madvise(
            ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_RANDOM
        )
        assert told == 0, os.strerror(ctypes.get_errno())


def forget(file):
    """Have the system drop `file` from its memory; skips the test where it does not."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if in_memory(file).any():
        pytest.skip("needs a temporary folder on a disk: this file system keeps its files in memory")


def in_memory(file):
    """Which pages of `file` can be had without reading from disk; asking reads none."""
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        pages = np.zeros(-(-len(mapped) // mmap.PAGESIZE), np.uint8)
        start = np.frombuffer(mapped, np.uint8).ctypes.data
        told = ctypes.CDLL(None, use_errno=True).mincore(
            ctypes.c_void_p(start), ctypes.c_size_t(len(mapped)), ctypes.c_void_p(pages.ctypes.data)
        )
        assert told == 0, os.strerror(ctypes.get_errno())
        return pages & 1 == 1


def embeds(backend, batch):
    return np.random.default_rng(batch).standard_normal((batch, LENGTH, backend.spec.hidden_size), np.float32)


def whole(reference, given):
    """The reference over whole rows at once, one after the other."""
    outputs = []
    for row in given:
        cache = reference.new_cache(1, LENGTH)
        outputs.append(reference.forward(row[None], np.arange(LENGTH)[None], cache, np.arange(LENGTH), captures=True))
    return outputs


def stepped(backend, given, cache, cuts):
    for start, stop in pairwise(cuts):
        yield backend.forward(given[:, start:stop], np.arange(start, stop)[None], cache, np.arange(stop - start), True)


def test_prefill_and_decode_over_chunks_match_the_reference(pair):
    backend, reference = pair
    given = embeds(backend, 1)
    (expected,) = whole(reference, given)
    parts = list(stepped(backend, given, backend.new_cache(1, 64), CUTS))
    logits = np.concatenate([part.logits for part in parts], 1)
    np.testing.assert_allclose(logits, expected.logits, atol=TOLERANCE * np.abs(expected.logits).max())
    for layer, hidden in expected.hiddens.items():
        found = np.concatenate([part.hiddens[layer] for part in parts], 1)
        np.testing.assert_allclose(found, hidden, atol=TOLERANCE * np.abs(hidden).max())
    assert len(expected.expert_ids) == [layer.ffn for layer in backend.spec.layers].count("moe")
    for layer, ids in expected.expert_ids.items():
        found = np.concatenate([part.expert_ids[layer] for part in parts], 1)
        assert np.array_equal(found, ids)  # sorted by score on both sides


def test_rows_of_a_batch_decode_apart_at_different_lengths(pair):
    backend, reference = pair
    given, starts = embeds(backend, 3), [3, 16, 31]
    expected = whole(reference, given)
    cache = backend.new_cache(3, 64)
    for row, start in enumerate(starts):
        cuts = sorted({0, *(cut for cut in CUTS if cut < start), start})
        list(stepped(backend, given[row : row + 1], cache.rows(row, row + 1), cuts))
    for turn in range(18):  # each row crosses a chunk boundary at another turn
        at = np.array(starts) + turn
        tokens = np.stack([given[row, position] for row, position in enumerate(at)])[:, None]
        logits = backend.forward(tokens, at[:, None], cache, np.array([0])).logits
        for row, position in enumerate(at):
            wanted = expected[row].logits[0, position]
            np.testing.assert_allclose(logits[row, 0], wanted, atol=TOLERANCE * np.abs(wanted).max())


def test_memory_holds_what_was_touched_and_no_copy_of_it(tmp_path, kernels):
    """Of 220 MB of weights a token has at most 1.1 times the bytes it needs in memory."""
    wide = {"hidden_size": 256, "intermediate_size": 2048, "num_local_experts": 16}
    toy, out = make_scout_toy(tmp_path / "toy", 7, vision=False, **wide), tmp_path / "out"
    lower(toy, out)
    compile_graphs(out, ["text", "embed"], Device(kernels=kernels))
    backend, infos = TvmBackend(out, model_spec(ModelConfig.load(toy)), threads=1), Checkpoint.open(toy).tensors
    map_no_more_than_is_touched(out / "weights")
    for file in (out / "weights").iterdir():
        forget(file)
    given, cache = embeds(backend, 1), backend.new_cache(1, 64)
    before = anonymous_bytes()
    backend.forward(given[:, :1], np.array([[0]]), cache, np.array([0]))
    mapped, made = mapped_bytes(out / "weights"), anonymous_bytes() - before

    stacks = {name: info for name, info in infos.items() if ".experts." in name}
    dense = sum(info.nbytes for name, info in infos.items() if name not in stacks and "embed_tokens" not in name)
    touched = dense + sum(info.nbytes // 16 for info in stacks.values())
    assert touched <= mapped
    assert mapped + made <= 1.1 * touched


def test_layers_of_one_class_share_their_code(tmp_path):
    counts = {}
    for layers in (8, 12):
        folder = tmp_path / str(layers)
        lower(make_scout_toy(folder / "toy", 1, vision=False, num_hidden_layers=layers), folder / "out")
        module = fuse(import_graph(folder / "out" / "text.onnx").module)
        names = [name.name_hint for name in module.get_global_vars()]
        counts[layers] = len(names), len([name for name in names if not name.endswith("_rows")])
    assert counts[8] == counts[12]
    assert counts[8][1] < 40


def test_compiled_code_asks_for_experts_first_and_computes_the_shared_one_meanwhile(tmp_path):
    lower(make_scout_toy(tmp_path / "toy", 1, vision=False), tmp_path / "out")
    module = fuse(import_graph(tmp_path / "out" / "text.onnx").module)
    for function in ("main", "step", "prompt"):
        calls = [name.rstrip("0123456789") for name in called(module, function)]
        requests = [place for place, name in enumerate(calls) if name == "expert_request"]
        dispatches = [place for place, name in enumerate(calls) if name == "expert_dispatch"]
        assert len(requests) == len(dispatches) > 0
        for start, stop in zip(requests, dispatches, strict=True):
            assert calls[start:stop].count("linear") == 3


def test_another_architecture_is_compiled_for_with_what_it_needs(tmp_path):
    from arriero.export.compile.build_kernels import build_kernels

    other = {"x86_64": "aarch64", "aarch64": "x86_64"}[platform.machine()]
    if shutil.which(f"{other.replace('_', '-')}-linux-gnu-g++") is None:
        pytest.skip(f"needs a cross compiler: apt-get install g++-{other.replace('_', '-')}-linux-gnu")
    lower(make_scout_toy(tmp_path / "toy", 1, vision=False), tmp_path / "out")
    build_kernels(other, tmp_path / "kernels.o")
    name = {"aarch64": "raspberry-pi-5", "x86_64": "x86-64-v3"}[other]
    compiled = compile_graphs(tmp_path / "out", ["embed"], Device(name, tmp_path / "kernels.o"))
    assert compiled.arch == other
    assert parse_cpu(str(compiled.cpu)) == parse_cpu(name)
    assert {"aarch64": "asimddp", "x86_64": "avx2"}[other] in compiled.features
    machine = (tmp_path / "out" / "embed.so").read_bytes()[18:20]  # e_machine of an ELF file
    assert machine == {"aarch64": b"\xb7\x00", "x86_64": b"\x3e\x00"}[other]


def test_processors_by_name_and_by_triple():
    assert {parse_cpu(name).arch for name in NAMED} == {"x86_64", "aarch64"}
    pi = parse_cpu("raspberry-pi-5")
    assert (pi.triple, pi.cpu) == ("aarch64-linux-gnu", "cortex-a76")
    own = parse_cpu("aarch64-linux-gnu cortex-a72 +crc +fullfp16")
    assert own.llvm["mattr"] == ["+crc", "+fullfp16"]
    assert parse_cpu("x86_64-linux-gnu").cpu == "generic"
    assert parse_cpu("native") in map(parse_cpu, NEEDS)


@pytest.mark.parametrize("text", ["pentium", "raspberry-pi", "riscv64-linux-gnu", "x86_64-linux-gnu znver4 avx2"])
def test_unknown_processors_are_refused(text):
    with pytest.raises(ArrieroError, match=r"there is no processor .*raspberry-pi-5.*LLVM triple"):
        parse_cpu(text)


@pytest.mark.parametrize("text", ["x86_64-apple-darwin", "x86_64-pc-windows-msvc", "aarch64-apple-darwin apple-m4"])
def test_other_systems_are_refused(text):
    with pytest.raises(ArrieroError, match=r"is not a triple of Linux.*aarch64-linux-gnu"):
        parse_cpu(text)


def test_a_processor_that_llvm_does_not_know_is_refused(tmp_path):
    with pytest.raises(ArrieroError, match=r"LLVM knows no aarch64 processor 'cortex-a1'.*cortex-a76"):
        compile_graphs(tmp_path, [], Device("aarch64-linux-gnu cortex-a1", tmp_path / "kernels.o"))


@pytest.mark.parametrize(
    ("arch", "have", "name"),
    [
        ("x86_64", NEEDS["x86-64-v4-vnni"], "x86-64-v4-vnni"),
        ("x86_64", NEEDS["x86-64-v3"], "x86-64-v3"),
        ("x86_64", {"sse2"}, "x86-64"),
        ("aarch64", {"asimd", "asimddp"}, "arm64-v8.2-dotprod"),
    ],
)
def test_native_is_the_best_that_the_machine_has(monkeypatch, arch, have, name):
    monkeypatch.setattr(cpus, "architecture", lambda: arch)
    monkeypatch.setattr(cpus, "cpu_features", lambda: frozenset(have))
    assert cpus.native() == name


def test_native_on_a_machine_we_have_no_kernels_for(monkeypatch):
    monkeypatch.setattr(cpus, "architecture", lambda: "riscv64")
    with pytest.raises(MachineLacks, match="riscv64"):
        parse_cpu("native")
