"""A cap on memory: the same answers whatever it is, experts read once per piece, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tvm", reason="needs apache-tvm: pip install 'arriero[tvm]'")

import arriero
from arriero.errors import ArrieroError
from arriero.export.build_file.model_spec import model_spec
from arriero.export.compile import Device
from arriero.export.compile.tvm import compile_graphs
from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.config import ModelConfig
from arriero.graphs.lower.part import Lowering
from arriero.graphs.lower.tvm import lower
from arriero.graphs.trace import trace_embed, trace_text
from arriero.profiles.recipe import load_profile
from arriero.runtimes import expert_cache, memory_cap
from arriero.runtimes.backend import MemoryCap
from arriero.runtimes.memory import anonymous_memory
from arriero.runtimes.memory_cap import RecordSize, share_memory
from arriero.runtimes.tvm import TvmBackend
from arriero.runtimes.weight_files import entry_bytes
from arriero.traits import PREFILL_PIECE
from tests.command import arriero as arriero_command
from tests.toys import make_maverick_toy, make_scout_toy

CONTEXT, BATCH = 64, 3
STEPS = [(0, 9), (9, 16), (16, 17), (17, 30), *((at, at + 1) for at in range(30, 48))]

TOYS = {
    "maverick, bf16": (lambda folder: make_maverick_toy(folder, 2), "fp32"),
    "maverick, four bits": (lambda folder: make_maverick_toy(folder, 3), "int4-nl"),
    "top-2, int8": (lambda folder: make_scout_toy(folder, 3, vision=False, num_experts_per_tok=2), "int8"),
    "scout, fp8": (lambda folder: make_scout_toy(folder, 4, vision=False), "fp8"),
}


@pytest.fixture(scope="module", params=list(TOYS))
def bundle(request, tmp_path_factory, kernels):
    """A compiled toy, and its spec."""
    make, profile = TOYS[request.param]
    folder = tmp_path_factory.mktemp("capped")
    toy, out = make(folder / "toy"), folder / "out"
    out.mkdir()
    config, checkpoint = ModelConfig.load(toy), Checkpoint.open(toy)
    schemes = load_profile(profile).rtn_baseline().assign(checkpoint.tensors)
    schemes = {
        name: one.model_copy(update={"block": 32}) if one.kind == "int_block" else one for name, one in schemes.items()
    }
    for part, trace in (("text", trace_text), ("embed", trace_embed)):
        lower(part, trace(config, checkpoint, folder / f"{part}.onnx"), Lowering(config, checkpoint, schemes, out))
    compile_graphs(out, ["text", "embed"], Device(kernels=kernels))
    return out, model_spec(config)


def walk(backend):
    """Logits of a prompt in pieces, of single tokens after it, and of a batch whose rows go their own ways."""
    draw = np.random.default_rng(5)
    embeds = draw.standard_normal((BATCH, CONTEXT, backend.spec.hidden_size), np.float32)
    logits = []
    cache = backend.new_cache(1, CONTEXT)
    for start, stop in STEPS:
        positions = np.arange(start, stop)[None]
        logits.append(backend.forward(embeds[:1, start:stop], positions, cache, np.arange(stop - start)).logits[0])
    cache = backend.new_cache(BATCH, CONTEXT)
    for row in range(BATCH):
        backend.forward(
            embeds[row : row + 1, : row + 1], np.arange(row + 1)[None], cache.rows(row, row + 1), np.array([0])
        )
    for turn in range(12):
        at = np.arange(BATCH) + 1 + turn
        tokens = np.stack([embeds[row, position] for row, position in enumerate(at)])[:, None]
        logits.append(backend.forward(tokens, at[:, None], cache, np.array([0])).logits[:, 0])
    return np.concatenate(logits)


def open_capped(bundle, monkeypatch, slots, threads=2):
    """The bundle with so many slots in each layer."""
    folder, spec = bundle
    share = memory_cap.MemoryShare((slots,) * sum(layer.ffn == "moe" for layer in spec.layers), PREFILL_PIECE)
    monkeypatch.setattr("arriero.runtimes.tvm.share_memory", lambda *_: share)
    return TvmBackend(folder, spec, threads, memory=MemoryCap(1 << 30, CONTEXT, BATCH))


def test_answers_are_the_same_bit_for_bit_whatever_the_cap(bundle, monkeypatch):
    folder, spec = bundle
    expected = walk(TvmBackend(folder, spec, threads=1))
    for slots in (1, 2, 3, spec.num_local_experts):
        capped = open_capped(bundle, monkeypatch, slots)
        assert np.array_equal(walk(capped), expected), slots
        reads = capped.statistics().layers
        assert [one.slots for one in reads] == [slots] * len(reads)
        assert all(one.hits + one.misses and one.misses for one in reads)
        if slots == spec.num_local_experts:  # nothing is ever read twice
            assert all(one.misses <= spec.num_local_experts for one in reads)
        capped.close()


def test_a_piece_reads_each_expert_that_it_needs_once(bundle, monkeypatch):
    capped = open_capped(bundle, monkeypatch, 1)
    x = np.random.default_rng(1).standard_normal((1, 16, capped.spec.hidden_size), np.float32)
    step = capped.forward(x, np.arange(16)[None], capped.new_cache(1, CONTEXT), np.arange(16), captures=True)
    for reads in capped.statistics().layers:
        chosen = np.unique(step.expert_ids[reads.layer])
        size = json.loads((bundle[0] / "text.json").read_text())["experts"][0]["bytes"]
        assert (reads.misses, reads.hits, reads.bytes) == (len(chosen), 0, len(chosen) * size)
    capped.close()


def test_the_expert_named_longest_ago_goes_first(bundle, monkeypatch):
    capped = open_capped(bundle, monkeypatch, 2)
    spec = capped.spec
    if spec.num_experts_per_tok != 1:
        pytest.skip("needs one expert per token: only then is the order of use a chain that can be followed by hand")
    draw, layers = np.random.default_rng(2), [n for n, layer in enumerate(spec.layers) if layer.ffn == "moe"]
    held, hits = {n: [] for n in layers}, dict.fromkeys(layers, 0)
    cache = capped.new_cache(1, CONTEXT)
    for at in range(40):
        x = draw.standard_normal((1, 1, spec.hidden_size), np.float32)
        for n, ids in capped.forward(x, np.array([[at]]), cache, np.array([0]), captures=True).expert_ids.items():
            expert = int(ids.item())
            hits[n] += expert in held[n]
            held[n] = [*(one for one in held[n] if one != expert), expert][-2:]
    assert {one.layer: one.hits for one in capped.statistics().layers} == hits
    capped.close()


def test_without_direct_reads_the_answers_are_the_same_and_the_reason_is_said(bundle, monkeypatch):
    folder, spec = bundle
    expected = walk(TvmBackend(folder, spec, threads=1))

    system_open = os.open

    def refuse_direct(path, flags, *rest):
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return system_open(path, flags, *rest)

    monkeypatch.setattr(expert_cache.os, "open", refuse_direct)
    capped = open_capped(bundle, monkeypatch, 2)
    assert np.array_equal(walk(capped), expected)
    assert re.search(r"text-experts-00001.safetensors has no direct reads \(Invalid", capped.statistics().buffered)
    capped.close()


def test_a_record_that_cannot_be_read_is_an_error_with_its_file(bundle, tmp_path, monkeypatch):
    folder = tmp_path / "short"
    shutil.copytree(bundle[0], folder)
    capped = open_capped((folder, bundle[1]), monkeypatch, 1)
    os.truncate(folder / "weights" / "text-experts-00001.safetensors", 4096)
    with pytest.raises(ArrieroError, match=r"text-experts-00001.*an expert of .*layers.* cannot be read \(No data"):
        walk(capped)
    capped.close()


def test_a_cap_that_is_too_small_is_refused_with_the_smallest_that_does(bundle):
    folder, spec = bundle

    def load(megabytes):
        return TvmBackend(folder, spec, 1, memory=MemoryCap(megabytes << 20, CONTEXT, BATCH))

    with pytest.raises(ArrieroError, match=r"a memory of 2 MiB is too small.*Give it \d+MiB") as refused:
        load(2)
    least = int(re.search(r"Give it (\d+)MiB", str(refused.value))[1])
    capped = load(least + 2)  # the process itself may have grown meanwhile
    walk(capped)
    assert anonymous_memory() <= (least + 2) << 20
    capped.close()


def test_the_embeddings_table_takes_no_memory_under_a_cap(bundle, monkeypatch):
    folder, spec = bundle
    (entry,) = json.loads((folder / "embed.json").read_text())["weights"]
    shared, core = [], memory_cap.share_memory

    def kept(cap, held, core_bytes, *rest):
        shared.append(core_bytes)
        return core(cap, held, core_bytes, *rest)

    monkeypatch.setattr("arriero.runtimes.tvm.share_memory", kept)
    room = anonymous_memory() + (1 << 30)  # other tests' memory is the process' too
    capped = TvmBackend(folder, spec, 1, memory=MemoryCap(room, CONTEXT, BATCH))
    others = json.loads((folder / "text.json").read_text())["weights"]
    assert shared == [sum(entry_bytes(other) for other in others)]
    assert entry["name"] not in {other["name"] for other in others}
    table = capped._graphs["embed"]._arrays[0]
    files = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [tuple(int(end, 16) for end in line[0].split("-")) for line in files if line[-1].endswith(entry["file"])]
    assert any(start <= table.ctypes.data < stop for start, stop in spans)
    ids = np.arange(9)[None]
    whole = TvmBackend(folder, spec, 1)
    none = np.zeros((0, spec.hidden_size), np.float32)
    assert np.array_equal(capped.embed(ids, none), whole.embed(ids, none))


def test_the_threads_that_read_end_with_the_session(bundle, monkeypatch):
    before = len(os.listdir("/proc/self/task"))
    capped = open_capped(bundle, monkeypatch, 1, threads=1)
    assert len(os.listdir("/proc/self/task")) == before + expert_cache.READERS
    capped.close()
    dropped = open_capped(bundle, monkeypatch, 1, threads=1)
    del dropped
    assert len(os.listdir("/proc/self/task")) == before


def test_memory_is_shared_out():
    """Of 100 MiB for experts: even slots, then one more in the first layers; larger pieces where they cost little."""
    spec = model_spec_of(chunk=8192)
    layers = [RecordSize(16, 3 << 20), RecordSize(16, 5 << 20)]

    def share(megabytes, step=lambda tokens: 0):
        cap = MemoryCap((megabytes << 20) + memory_cap.MARGIN + memory_cap.cache_bytes(spec, 4096, 2), 4096, 1)
        return share_memory(cap, 0, 0, layers, spec, step, 2)

    assert share(8).slots == (1, 1)
    assert share(11).slots == (2, 1)
    assert share(100).slots == (13, 12)
    assert share(1000).slots == (16, 16)
    assert share(100).piece == 4096
    assert share(1000).piece == PREFILL_PIECE  # all experts fit: a piece saves no reads
    assert share(100, lambda tokens: tokens << 10).piece == 4096
    assert share(100, lambda tokens: tokens << 13).piece == 1024
    with pytest.raises(ArrieroError, match="8 MiB for one expert of each layer"):
        share(7)


def model_spec_of(chunk):
    from arriero.runtimes.backend import LayerSpec, ModelSpec

    layers = (LayerSpec("chunked", "moe"), LayerSpec("global", "moe"))
    return ModelSpec("llama4", 1000, 64, 4, 2, 16, 16, 1, chunk, 1 << 20, layers, None, None, None, (1,))


def test_a_process_stays_below_its_cap(tvm_workshop):
    """From the first import to the last token, pictures included; measured by the system."""
    bundle = tvm_workshop / "bundles" / "int8"
    script = f"""
import json, re
import numpy as np
import arriero
from arriero.errors import ArrieroError
try:
    arriero.load({str(bundle)!r}, threads=2, memory="1MiB")
except ArrieroError as error:
    least = re.search(r"Give it (\\d+)MiB", str(error))[1]
with arriero.load({str(bundle)!r}, threads=2, memory=f"{{int(least) + 4}}MiB") as session:
    image = np.random.default_rng(3).integers(0, 255, (32, 32, 3), np.uint8)
    cases = (1, []), (3, [image])
    texts = [session.generate("What is 17 + 25? " * n, given, max_tokens=12).token_ids for n, given in cases]
    stats = session.stats().experts
status = open("/proc/self/status").read()
print(json.dumps([texts, int(least) + 4, int(re.search(r"RssAnon:\\s+(\\d+)", status)[1]), len(stats.layers)]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    texts, cap, used, layers = json.loads(done.stdout)
    image = np.random.default_rng(3).integers(0, 255, (32, 32, 3), np.uint8)
    with arriero.load(bundle, threads=1) as session:
        for (n, images), capped in zip(((1, []), (3, [image])), texts, strict=True):
            assert session.generate("What is 17 + 25? " * n, images, max_tokens=12).token_ids == capped
        assert session.stats().experts.layers == ()
    assert used <= cap << 10
    assert layers


def test_the_command_says_what_it_read(tvm_workshop):
    asked = ("run", tvm_workshop / "bundles" / "int8", "What is 17 + 25?", "--max-tokens", 4, "--memory", "64GiB")
    shown = arriero_command(*asked)
    assert re.search(
        r"experts: 100% fit in memory, \d+% of those needed were there, [\d.]+ \w+ read", " ".join(shown.err.split())
    )
    layers = arriero_command(*asked, "--json").json["reads"]["layers"]
    assert all(layer["slots"] == layer["experts"] and layer["misses"] for layer in layers)


def test_a_backend_that_keeps_to_no_cap_says_why(workshop):
    with pytest.raises(ArrieroError, match=r"onnxruntime keeps to no cap .*: it copies every weight.*backend tvm"):
        arriero.load(workshop / "bundles" / "fp32", memory="8GiB")
    with pytest.raises(ArrieroError, match="'lots' is not a size"):
        arriero.load(workshop / "bundles" / "fp32", memory="lots")


def test_mapped_experts_have_no_statistics(bundle):
    assert TvmBackend(*bundle, threads=1).statistics().layers == ()
