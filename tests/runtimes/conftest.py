"""A toy model with every feature that sessions deal with: once in plain numpy, once as ONNX graphs in a bundle."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import EpsImagePlugin
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import arriero
from arriero.export.proof.reference import TorchBackend
from arriero.runtimes.backend import Between, Floats, Ints, ModelSpec, StepGivenUp, StepOutput
from arriero.runtimes.manifest import FORMAT, REPORTS, FileRecord, file_sha256, link, manifest_digest, parity_digest
from arriero.runtimes.processor.processor import IMAGE_TOKENS, PATCH, Processor
from arriero.runtimes.session import Session
from arriero.runtimes.snapshot import Snapshot
from arriero.traits import PREFILL_PIECE
from tests.toys import load_reference

HIDDEN, HEADS, KV_HEADS, DIM, EXPERTS, CHUNK, CONTEXT = 16, 4, 2, 8, 4, 8, 64
IMAGE_SIZE, PATCH_SIZE, TILE_TOKENS = 28, 7, 4
SPECIALS = ["<|begin_of_text|>", "<|eot|>", "<|header_start|>", "<|header_end|>", *IMAGE_TOKENS]
VOCAB = 256 + len(SPECIALS)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
TEMPLATE = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|header_start|>' + message['role'] + '<|header_end|>' }}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- else %}
        {%- for entry in message['content'] %}
            {{- '<|image|>' if entry['type'] == 'image' else entry['text'] }}
        {%- endfor %}
    {%- endif %}
    {{- '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|header_start|>assistant<|header_end|>' }}
{%- endif %}
"""


def model_entry(**changes: Any) -> dict[str, Any]:
    """Give the manifest's `model` entry of the toy: a chunked MoE layer, then a global dense one."""
    text = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": DIM,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 1,
        "attention_chunk_size": CHUNK,
        "max_position_embeddings": 1024,
        "layers": [{"attention": "chunked", "ffn": "moe"}, {"attention": "global", "ffn": "dense"}],
    }
    entry = {
        "model_type": "llama4",
        "text": text,
        "vision": {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "tokens_per_tile": TILE_TOKENS},
        "image_token_id": 256 + SPECIALS.index(PATCH),
        "bos_token_id": 256,
        "eos_token_ids": [257],
    }
    return entry | changes


class Weights:
    """The toy's weights: random, but large enough that attention and answers depend on the whole past."""

    def __init__(self) -> None:
        random = np.random.default_rng(5)

        def draw(*shape: int) -> Floats:
            return (random.standard_normal(shape) * 1.4 / np.sqrt(shape[0])).astype(np.float32)

        self.embedding = random.standard_normal((VOCAB, HIDDEN)).astype(np.float32)
        self.head = draw(HIDDEN, VOCAB)
        self.head[:, 256:] = 0  # the toy prefers plain bytes, so that answers run on
        self.frequencies = random.uniform(0.1, 2.0, HIDDEN).astype(np.float32)
        self.layers = [
            {
                "q": draw(HIDDEN, HEADS * DIM),
                "k": draw(HIDDEN, KV_HEADS * DIM),
                "v": draw(HIDDEN, KV_HEADS * DIM),
                "o": draw(HEADS * DIM, HIDDEN),
                "router": draw(HIDDEN, EXPERTS),
            }
            for _ in range(2)
        ]
        # the int8 cache's steps by layer: for keys, for values [K, D]; coarse enough to tell, a few values clip
        self.steps = random.uniform(0.08, 0.16, (2, 2, KV_HEADS, DIM)).astype(np.float32)
        self.vision = draw(3 * IMAGE_SIZE * IMAGE_SIZE // TILE_TOKENS, HIDDEN)


class ToyCache:
    """Every key, value and position ever seen, row by row: nothing is restarted, so masks must be explicit."""

    def __init__(self, store: list[list[tuple[Floats, Floats]]], lengths: Ints, adapters: Ints, capacity: int) -> None:
        self.store, self.lengths, self.adapters, self.capacity = store, lengths, adapters, capacity

    def rows(self, start: int, stop: int) -> ToyCache:
        return ToyCache(self.store[start:stop], self.lengths[start:stop], self.adapters[start:stop], self.capacity)

    def reserve(self, tokens: int) -> None:
        assert tokens <= self.capacity

    def copy_row(self, source: int, target: int) -> None:
        self.store[target][:] = self.store[source]
        self.lengths[target] = self.lengths[source]
        self.adapters[target] = self.adapters[source]

    def truncate(self, row: int, length: int) -> None:
        self.store[row][:] = [(keys[:length], values[:length]) for keys, values in self.store[row]]
        self.lengths[row] = length

    def snapshot(self, row: int, start: int = 0) -> Snapshot:
        length = int(self.lengths[row])
        firsts = [length - length % CHUNK, 0]
        keys, values = (
            tuple(
                layer[which][max(first, start) :].transpose(1, 0, 2).copy()
                for layer, first in zip(self.store[row], firsts, strict=True)
            )
            for which in (0, 1)
        )
        return Snapshot(ModelSpec.parse(model_entry()), length, keys, values, int(self.adapters[row]), start)

    def restore(self, row: int, snapshot: Snapshot) -> None:
        pairs = []
        for kept in zip(snapshot.keys, snapshot.values, strict=True):
            missing = np.zeros((snapshot.length - kept[0].shape[1], KV_HEADS, DIM), np.float32)  # hidden by the mask
            pairs.append(tuple(np.concatenate([missing, one.transpose(1, 0, 2)]) for one in kept))
        self.store[row][:] = pairs
        self.lengths[row], self.adapters[row] = snapshot.length, snapshot.adapter


class ToyBackend:
    """The toy in numpy: any number of rows with any number of steps, attention by explicit masks.

    `rounds`: whether new keys and values are rounded as an int8 cache rounds them.
    """

    piece, few_rows = PREFILL_PIECE, 0

    def __init__(self, rounds: bool = False) -> None:
        self.rounds = rounds
        self.spec = ModelSpec.parse(model_entry())
        self.weights = Weights()
        self.steps: list[tuple[int, int]] = []
        self.images_seen = 0

    def vision(self, pixel_values: Floats) -> Floats:
        self.images_seen += 1
        return pixel_values.reshape(len(pixel_values) * TILE_TOKENS, -1) @ self.weights.vision

    def embed(self, input_ids: Ints, image_features: Floats) -> Floats:
        embeds = self.weights.embedding[input_ids]
        embeds[input_ids == self.spec.image_token_id] = image_features
        return embeds

    def new_cache(self, batch: int, capacity: int) -> ToyCache:
        empty = np.zeros((0, KV_HEADS, DIM), np.float32)
        rows, lengths, adapters = [[(empty, empty)] * 2 for _ in range(batch)], *np.zeros((2, batch), np.int64)
        return ToyCache(rows, lengths, adapters, capacity)

    def forward(
        self, inputs_embeds: Floats, positions: Ints, cache: Any, logits_index: Ints, captures: bool = False
    ) -> StepOutput:
        batch, steps, _ = inputs_embeds.shape
        self.steps.append((batch, steps))
        assert np.array_equal(positions, cache.lengths[:, None] + np.arange(steps))
        assert int(cache.lengths.max()) + steps <= cache.capacity
        rows = [self._row(inputs_embeds[b], positions[b], cache.store[b]) for b in range(batch)]
        cache.lengths += steps
        logits = np.stack([hiddens[-1][logits_index] @ self.weights.head for hiddens, _ in rows])
        if not captures:
            return StepOutput(logits)
        return StepOutput(
            logits, {0: np.stack([ids for _, ids in rows])}, {i: np.stack([h[i] for h, _ in rows]) for i in range(2)}
        )

    def _row(self, x: Floats, positions: Ints, store: list[tuple[Floats, Floats]]) -> tuple[list[Floats], Ints]:
        w = self.weights
        x = x + np.sin(positions[:, None].astype(np.float32) * w.frequencies)
        hiddens = []
        for number, layer in enumerate(w.layers):
            new = [(x @ layer[name]).reshape(-1, KV_HEADS, DIM) for name in "kv"]
            if self.rounds:
                steps = w.steps[number]
                new = [np.clip(np.rint(one / step), -128, 127) * step for one, step in zip(new, steps, strict=True)]
            keys, values = (np.concatenate(pair) for pair in zip(store[number], new, strict=True))
            store[number] = keys, values
            q = (x @ layer["q"]).reshape(-1, HEADS, DIM)
            held = np.arange(len(keys))
            seen = held <= positions[:, None]
            if number == 0:
                seen &= held // CHUNK == positions[:, None] // CHUNK
            shared = [kv for kv in range(KV_HEADS) for _ in range(HEADS // KV_HEADS)]
            scores = np.einsum("snd,pnd->nsp", q, keys[:, shared]) * DIM**-0.5
            scores = np.where(seen, scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            x = x + np.einsum("nsp,pnd->snd", weights, values[:, shared]).reshape(len(x), -1) @ layer["o"]
            hiddens.append(x)
        return hiddens, np.argmax(hiddens[0] @ w.layers[0]["router"], -1)[:, None]

    def close(self) -> None:
        pass


class PackingToy(ToyBackend):
    """The toy as a backend that takes rows of different numbers of tokens in one step; `packed` has their numbers."""

    packs = True

    def __init__(self) -> None:
        super().__init__()
        self.packed: list[list[int]] = []

    def forward_packed(
        self, inputs_embeds: Floats, counts: Ints, cache: Any, logits_index: Ints, captures: bool = False
    ) -> StepOutput:
        self.packed.append(counts.tolist())
        assert int((cache.lengths + counts).max()) <= cache.capacity
        hiddens, start = [], 0
        for row, count in enumerate(counts.tolist()):
            positions = cache.lengths[row] + np.arange(count)
            assert len({int(position) // CHUNK for position in positions}) <= 1
            if count:
                hiddens.append(self._row(inputs_embeds[start : start + count], positions, cache.store[row])[0][-1])
            start += count
        assert start == len(inputs_embeds)
        cache.lengths += counts
        return StepOutput((np.concatenate(hiddens)[logits_index] @ self.weights.head)[None])


TOY_PRODUCTS = 3


def _leave(between: Between) -> None:
    if (between() or 0) < 0:
        raise StepGivenUp


class PreemptibleToy(PackingToy):
    """The toy as a backend whose steps are left before each of its layers, and whose tower is left before products."""

    preemptible = True

    def __init__(self) -> None:
        super().__init__()
        self.looks: list[int] = []  # steps of others while a tile was seen

    def vision_preempted(self, pixel_values: Floats, between: Between) -> Floats:
        before = len(self.steps)
        for _ in range(TOY_PRODUCTS):
            _leave(between)
        self.looks.append(len(self.steps) - before)
        return self.vision(pixel_values)

    def forward_preempted(
        self, inputs_embeds: Floats, positions: Ints, cache: Any, logits_index: Ints, between: Between
    ) -> Floats:
        for _ in self.spec.layers:
            _leave(between)
        return self.forward(inputs_embeds, positions, cache, logits_index).logits


def _value(name: str, shape: list[Any], kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def _save(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    constants: dict[str, np.ndarray],
) -> None:
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, path.stem, inputs, outputs, tensors)
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)


def write_graphs(folder: Path, rounds: bool = False) -> None:
    """Write text.onnx with the lowered signature, vision.onnx and embed.onnx of the toy; `rounds`: cache in int8."""
    node, w = helper.make_node, Weights()
    cache = TensorProto.INT8 if rounds else TensorProto.FLOAT
    quantized = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
    i64, i32 = TensorProto.INT64, TensorProto.INT32
    inputs = [
        _value("inputs_embeds", ["B", "S", HIDDEN]),
        _value("positions", ["B", "S"], i64),
        _value("logits_index", ["L"], i64),
    ]
    for name in ("chunk", "global"):
        inputs += [_value(f"{name}_seqlens_k", ["B"], i32), _value(f"{name}_total", [1], i32)]
    outputs = [_value("logits", ["B", "L", VOCAB])]
    constants = {"frequencies": w.frequencies, "head": w.head, "last": np.array([-1]), "one": np.array([1])}
    constants |= {"flat": np.array([-1, HIDDEN])}
    nodes = [
        node("Cast", ["positions"], ["p"], to=TensorProto.FLOAT),
        node("Unsqueeze", ["p", "last"], ["p1"]),
        node("Mul", ["p1", "frequencies"], ["pf"]),
        node("Sin", ["pf"], ["ps"]),
        node("Add", ["inputs_embeds", "ps"], ["x0"]),
    ]
    for i, layer in enumerate(w.layers):
        constants |= {f"{name}{i}": array for name, array in layer.items() if name != "router" or i == 0}
        kind = "chunk" if i == 0 else "global"
        for name in ("key", "value"):
            slots = [f"{kind}_capacity"]
            inputs.append(_value(f"past_{name}.{i}", ["B", KV_HEADS, *slots, DIM], cache))
            outputs.append(_value(f"present_{name}.{i}", ["B", KV_HEADS, *slots, DIM], cache))
        outputs.append(_value(f"hidden.{i}", ["B", "S", HIDDEN]))
        nodes += [node("MatMul", [f"x{i}", f"{name}{i}"], [f"{name}_{i}"]) for name in "qkv"]
        scales = [f"key_step{i}", f"value_step{i}"] if rounds else []
        constants |= {name: step[None, :, None] for name, step in zip(scales, w.steps[i], strict=False)}
        attention_inputs = [f"q_{i}", f"k_{i}", f"v_{i}", f"past_key.{i}", f"past_value.{i}"]
        nodes += [
            node(
                "GroupQueryAttention",
                [*attention_inputs, f"{kind}_seqlens_k", f"{kind}_total", *([""] * 5 + scales if rounds else [])],
                [f"a_{i}", f"present_key.{i}", f"present_value.{i}"],
                domain="com.microsoft",
                num_heads=HEADS,
                kv_num_heads=KV_HEADS,
                scale=DIM**-0.5,
                **(quantized if rounds else {}),
            ),
            node("MatMul", [f"a_{i}", f"o{i}"], [f"ao_{i}"]),
            node("Add", [f"x{i}", f"ao_{i}"], [f"x{i + 1}"]),
            node("Identity", [f"x{i + 1}"], [f"hidden.{i}"]),
        ]
    outputs.append(_value("expert_id.0", ["T", 1], i64))
    nodes += [
        node("Reshape", ["x1", "flat"], ["t"]),
        node("MatMul", ["t", "router0"], ["r"]),
        node("TopK", ["r", "one"], ["score", "expert_id.0"]),
        node("Gather", ["x2", "logits_index"], ["picked"], axis=1),
        node("MatMul", ["picked", "head"], ["logits"]),
    ]
    _save(folder / "text.onnx", nodes, inputs, outputs, constants)

    rows = 3 * IMAGE_SIZE * IMAGE_SIZE // TILE_TOKENS
    nodes = [node("Reshape", ["pixel_values", "shape"], ["flat"]), node("MatMul", ["flat", "w"], ["image_features"])]
    pixels = [_value("pixel_values", ["n", 3, IMAGE_SIZE, IMAGE_SIZE])]
    features = _value("image_features", ["M", HIDDEN])
    _save(folder / "vision.onnx", nodes, pixels, [features], {"shape": np.array([-1, rows]), "w": w.vision})

    nodes = [
        node("Gather", ["table", "input_ids"], ["plain"]),
        node("Equal", ["input_ids", "image"], ["is_image"]),
        node("NonZero", ["is_image"], ["found"]),
        node("Transpose", ["found"], ["where"]),
        node("ScatterND", ["plain", "where", "image_features"], ["inputs_embeds"]),
    ]
    image = np.array(ModelSpec.parse(model_entry()).image_token_id)
    ids, embeds = _value("input_ids", ["B", "S"], i64), _value("inputs_embeds", ["B", "S", HIDDEN])
    _save(folder / "embed.onnx", nodes, [ids, features], [embeds], {"table": w.embedding, "image": image})


def write_tokenizer(folder: Path) -> None:
    """Write a byte-level tokenizer (256 bytes, then the special tokens) with its configs and chat template."""
    folder.mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.enable_truncation(5)  # as left behind by a training run; a runtime must not obey it
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": SPECIALS[0], "eos_token": SPECIALS[1]}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    settings = {"size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}, "max_patches": 4}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def write_manifest(folder: Path, **changes: Any) -> dict[str, Any]:
    """Write a manifest that fits the files in `folder`."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "manifest.json"]
    manifest = {
        "format": FORMAT,
        "record": "0" * 64,
        "arriero": "0.1.0",
        "name": "toy",
        "model": model_entry(),
        "target": {
            "name": "toy",
            "backend": "onnxruntime",
            "profile": "fp32",
            "context": CONTEXT,
            "batch": 2,
            "arch": "any",
            "shard": 4 << 30,
            "kv_cache": "float32",
        },
        "build": {"graph": "0"},
        "tools": {},
        "weights": {},
        "calibrated": {"calibration": {"set": "none", "seed": 0, "sha256": "0", "samples": {}}, "coverage": {}},
        "rounded": {"fallback": [], "choice": None},
        "proof": {"thresholds": {}, "rtn": None, "unmeasured": None},
        "kv_bytes_per_token": {},
        "measured": {"peak_memory_bytes": 0, "seconds": {}},
        "files": {
            str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in files
        },
    } | changes
    seal(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return manifest


def seal(manifest: dict[str, Any]) -> None:
    """Give the manifest the hash chain that fits what it says."""
    graph, profile = link("0", manifest["build"]["graph"]), link("0", "1")
    artifact = link(profile, manifest_digest(manifest))
    record = link(artifact, manifest["record"])
    parity = link(record, parity_digest({name: FileRecord(**record) for name, record in manifest["files"].items()}))
    manifest["chain"] = {
        "checkpoint": "0",
        "graph": graph,
        "profile": profile,
        "artifact": artifact,
        "record": record,
        "parity": parity,
    }


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a bundle of the toy; read-only, copy it to change it."""
    folder = tmp_path_factory.mktemp("toy")
    write_tokenizer(folder / "tokenizer")
    write_graphs(folder)
    for report in REPORTS:
        (folder / report).write_text("{}")
    write_manifest(folder)
    return folder


@pytest.fixture
def toy() -> ToyBackend:
    return ToyBackend()


@pytest.fixture
def processor(bundle: Path, toy: ToyBackend) -> Processor:
    return Processor(bundle / "tokenizer", toy.spec)


@pytest.fixture
def ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a program called gs first, which Pillow would start for EPS; gives the file that it leaves."""
    trace, folder = tmp_path / "started", tmp_path / "programs"
    folder.mkdir()
    (folder / "gs").write_text(f"#!/bin/sh\ntouch '{trace}'\n")
    (folder / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    return trace


@pytest.fixture(params=[ToyBackend, PackingToy])
def toy_session(request: pytest.FixtureRequest, processor: Processor) -> Iterator[Session]:
    with Session(request.param(), processor, context=200, batch=3) as opened:
        yield opened


@pytest.fixture(params=["onnxruntime", "tvm", "reference"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def whole(request: pytest.FixtureRequest, kind: str) -> Iterator[Session]:
    """A session of each backend over the same small model, which drafts nothing yet."""
    workshop = request.getfixturevalue("tvm_workshop" if kind == "tvm" else "workshop")
    bundle = workshop / "bundles" / "fp32"
    if kind != "reference":
        with arriero.load(bundle, threads=2, batch=4) as session:
            yield session
        return
    backend = TorchBackend.of(load_reference(workshop / "scout"))
    with Session(backend, Processor(bundle / "tokenizer", backend.spec), 400, 4) as reference:
        yield reference
