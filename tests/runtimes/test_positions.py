"""Scout's constants at positions up to 10,485,759: PyTorch and both CPU backends against a decoder in float64.

The float64 decoder is written out below in numpy, so that it shares no code with what it judges. Rows that long come
from a snapshot with random past keys and values. Beyond the first chunks all layers are chunked, NoPE ones too: a
global layer would need its ten million keys. Legend: S new tokens, P past slots, K key/value heads, D head size.
"""

from __future__ import annotations

import math
import platform
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from arriero.export.build_file.model_spec import model_spec
from arriero.export.compile import Device
from arriero.export.compile.build_kernels import build_kernels
from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.config import ModelConfig
from arriero.graphs.lower.part import Lowering
from arriero.graphs.rotary import inverse_frequencies, rotation_table
from arriero.graphs.trace import trace_embed, trace_text
from arriero.profiles.recipe import load_profile
from arriero.runtimes.backend import BackendOptions
from arriero.runtimes.snapshot import Snapshot, slots_held
from tests.toys import load_reference, make_scout_toy

pytestmark = pytest.mark.usefixtures("one_thread")
# Relative to the largest value, float32 against float64: measured up to 6.7e-7. With float32 angles the last window's
# keys are off by 0.24 and its logits by 2e-3, the first one's by 1.5e-4 and 9e-6.
TOLERANCE = 4e-6
CHUNK, LAST = 8192, 10_485_759
SCOUT: dict[str, Any] = {
    "head_dim": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "attention_chunk_size": CHUNK,
    "floor_scale": 8192,
    "attn_scale": 0.1,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    },
    "max_position_embeddings": LAST + 1,
}
CHUNKED = {**SCOUT, "layer_types": ["chunked_attention"] * 4}
# Model and first position of a window of WINDOW tokens. The first holds 8,191 and 8,192, on both sides of an edge.
WINDOW = 8
CASES = {
    "8,191 and 8,192, global": (SCOUT, 8_188),
    "8,191 and 8,192": (CHUNKED, 8_188),
    "1,000,000": (CHUNKED, 999_996),
    "10,485,759": (CHUNKED, LAST - WINDOW + 1),
}
Past = tuple[np.ndarray, np.ndarray, np.ndarray]  # keys and values [P, K, D], positions [P]


class Decoder64:
    """Scout's decoder over one row in float64, from the formulas of the Llama 4 model code."""

    def __init__(self, folder: Path) -> None:
        checkpoint, text = Checkpoint.open(folder), ModelConfig.load(folder).text
        self.text = text
        self.weights = {
            name.removeprefix("language_model.").removeprefix("model."): checkpoint.read_float32(name).astype(float)
            for name in checkpoint.tensors
        }
        frequencies = [text.rope.theta ** (-2 * i / text.head_dim) for i in range(text.head_dim // 2)]
        slow = [2 * math.pi / frequency > text.rope.original_context for frequency in frequencies]
        pairs = zip(frequencies, slow, strict=True)
        self.frequencies = np.array([each / text.rope.factor if far else each for each, far in pairs])

    def norm(self, x: np.ndarray, weight: np.ndarray | float = 1.0) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.text.rms_norm_eps) * weight

    def rotate(self, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """[S, heads, D] as complex numbers, turned by their angles."""
        turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * positions[:, None, None] * self.frequencies)
        return np.stack([turned.real, turned.imag], -1).reshape(x.shape)

    def swiglu(self, x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
        middle = x @ gate
        return (middle / (1 + np.exp(-middle)) * (x @ up)) @ down

    def attend(self, layer: int, x: np.ndarray, positions: np.ndarray, past: Past) -> tuple[np.ndarray, Past]:
        """Attention of `x` [S, H]; gives the output [S, H] and all keys and values [P+S, K, D] of the layer."""
        text, spec = self.text, self.text.layers[layer]
        w = {name: self.weights[f"layers.{layer}.self_attn.{name}_proj.weight"].T for name in "qkvo"}
        q, k, v = ((x @ w[name]).reshape(len(x), -1, text.head_dim) for name in "qkv")
        if spec.rope:
            q, k = (self.norm(self.rotate(each, positions)) for each in (q, k))
        else:
            q = q * (np.log1p((positions + 1) // text.floor_scale) * text.attn_scale + 1)[:, None, None]
        keys, values, places = (np.concatenate(pair) for pair in zip(past, (k, v, positions), strict=True))
        seen = places <= positions[:, None]  # [S, P+S]
        if spec.chunked:
            seen &= places // text.chunk == positions[:, None] // text.chunk
        scores = np.einsum("snd,pd->snp", q, keys[:, 0]) / math.sqrt(text.head_dim)  # one key/value head
        scores = np.where(seen[:, None], scores, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        out = np.einsum("snp,pd->snd", shares, values[:, 0]).reshape(len(x), -1)
        return out @ w["o"], (keys, values, places)

    def experts(self, layer: int, x: np.ndarray) -> np.ndarray:
        """The shared expert and the best routed one of each token, whose input the score multiplies."""
        w = {
            name.removeprefix(f"layers.{layer}.feed_forward."): value
            for name, value in self.weights.items()
            if name.startswith(f"layers.{layer}.feed_forward.")
        }
        logits = x @ w["router.weight"].T
        out = self.swiglu(x, *(w[f"shared_expert.{name}_proj.weight"].T for name in ("gate", "up", "down")))
        for token, expert in enumerate(logits.argmax(-1)):
            scored = x[token] / (1 + np.exp(-logits[token, expert]))
            gate, up = np.split(w["experts.gate_up_proj"][expert], 2, -1)
            out[token] += self.swiglu(scored, gate, up, w["experts.down_proj"][expert])
        return out

    def forward(self, x: np.ndarray, positions: np.ndarray, pasts: list[Past]) -> tuple[np.ndarray, list[np.ndarray]]:
        """Logits [S, V] of embeddings [S, H], and each layer's new keys [S, K, D]."""
        keys = []
        for layer, past in enumerate(pasts):
            normed = self.norm(x, self.weights[f"layers.{layer}.input_layernorm.weight"])
            attended, (every, _, _) = self.attend(layer, normed, positions, past)
            keys.append(every[-len(x) :])
            x = x + attended
            x = x + self.experts(layer, self.norm(x, self.weights[f"layers.{layer}.post_attention_layernorm.weight"]))
        return self.norm(x, self.weights["norm.weight"]) @ self.weights["lm_head.weight"].T, keys


class Window:
    """Tokens at the positions of one case, the past before them, and what float64 says of them."""

    def __init__(self, toy: Path, start: int) -> None:
        self.config = ModelConfig.load(toy)
        spec, draw = model_spec(self.config), np.random.default_rng(start)
        self.positions = np.arange(start, start + WINDOW)
        self.embeds = draw.standard_normal((WINDOW, spec.hidden_size)).astype(np.float32)
        shapes = [(spec.num_key_value_heads, held, spec.head_dim) for held in slots_held(spec, start)]
        keys, values = (tuple(draw.standard_normal(each).astype(np.float32) for each in shapes) for _ in range(2))
        self.snapshot = Snapshot(spec, start, keys, values)
        self.pasts = [
            (key.swapaxes(0, 1), value.swapaxes(0, 1), np.arange(start - key.shape[1], start))
            for key, value in zip(keys, values, strict=True)
        ]
        self.logits, self.keys = Decoder64(toy).forward(self.embeds.astype(float), self.positions, self.pasts)

    def pieces(self) -> list[slice]:
        """The tokens in steps that cross no chunk."""
        edge = -self.positions[0] % CHUNK
        return [slice(0, edge), slice(edge, WINDOW)] if 0 < edge < WINDOW else [slice(0, WINDOW)]


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("positions")
    return {
        name: make_scout_toy(folder / name, 7, vision=False, **text)
        for name, text in (("global", SCOUT), ("chunked", CHUNKED))
    }


@pytest.fixture(scope="module", params=CASES)
def window(request: pytest.FixtureRequest, toys: dict[str, Path]) -> tuple[str, Window]:
    text, start = CASES[request.param]
    name = "chunked" if text is CHUNKED else "global"
    return name, Window(toys[name], start)


@pytest.fixture(scope="module", params=["onnxruntime", "tvm"])
def backends(request: pytest.FixtureRequest, toys: dict[str, Path], tmp_path_factory: pytest.TempPathFactory):
    """The two toys, built for one backend in float32."""
    if request.param == "tvm":
        pytest.importorskip("tvm", reason="needs apache-tvm: pip install 'arriero[tvm]'")
    folder = tmp_path_factory.mktemp(request.param)
    kernels = folder / "kernels.o"
    if request.param == "tvm":
        build_kernels(platform.machine(), kernels)
    opened = {}
    for name, toy in toys.items():
        config, checkpoint = ModelConfig.load(toy), Checkpoint.open(toy)
        lowering = Lowering(config, checkpoint, load_profile("fp32").assign(checkpoint.tensors), folder / name)
        for part, trace in (("text", trace_text), ("embed", trace_embed)):
            graph = trace(config, checkpoint, folder / f"{name}-{part}" / f"{part}.onnx")
            import_module(f"arriero.graphs.lower.{request.param}").lower(part, graph, lowering)
        compiler = import_module(f"arriero.export.compile.{request.param}")
        compiler.compile_graphs(folder / name, ["text", "embed"], Device(kernels=kernels))
        runtime = import_module(f"arriero.runtimes.{request.param}")
        opened[name] = runtime.open_backend(folder / name, model_spec(config), BackendOptions(threads=1))
    return opened


def error(ours: np.ndarray, exact: np.ndarray) -> float:
    return float(np.abs(ours - exact).max() / np.abs(exact).max())


def test_a_backend_equals_float64_at_long_positions(backends, window):
    name, case = window
    backend = backends[name]
    cache = backend.new_cache(1, LAST + 1 if name == "chunked" else case.positions[-1] + 1)
    cache.restore(0, case.snapshot)
    logits, keys = [], []
    for piece in case.pieces():
        index = np.arange(piece.stop - piece.start)
        logits.append(backend.forward(case.embeds[None, piece], case.positions[None, piece], cache, index).logits[0])
        keys.append([layer[:, -len(index) :] for layer in cache.snapshot(0).keys] if cache.lengths[0] % CHUNK else None)
    assert error(np.concatenate(logits), case.logits) <= TOLERANCE
    if keys[-1] is not None:  # a snapshot at the chunk's edge holds no keys of chunked layers
        last = [layer[case.pieces()[-1]].swapaxes(0, 1) for layer in case.keys]
        assert max(map(error, keys[-1], last)) <= TOLERANCE


@torch.no_grad()
def test_the_reference_equals_float64_at_long_positions(window, toys):
    name, case = window
    model = load_reference(toys[name]).language_model
    past = [tuple(torch.from_numpy(each.swapaxes(0, 1)[None].copy()) for each in layer[:2]) for layer in case.pasts]
    kinds = {layer.chunked: places for layer, (_, _, places) in zip(case.config.text.layers, case.pasts, strict=True)}
    chunk_places = torch.from_numpy(kinds[True])[None]
    global_places = torch.from_numpy(kinds.get(False, np.zeros(0, np.int64)))[None]
    positions, index = torch.from_numpy(case.positions)[None], torch.arange(WINDOW)
    step = model(torch.from_numpy(case.embeds)[None], positions, chunk_places, global_places, index, past)
    assert error(step.logits[0].numpy(), case.logits) <= TOLERANCE
    for (present, _), keys in zip(step.present, case.keys, strict=True):
        assert error(present[0, :, -WINDOW:].numpy(), keys.swapaxes(0, 1)) <= TOLERANCE


def test_angles_are_exact_where_float32_ones_are_half_a_radian_off(toys):
    text = ModelConfig.load(toys["global"]).text
    positions = torch.cat([torch.arange(600), torch.randint(LAST, (3000,)), torch.tensor([8191, 8192, 10**6, LAST])])
    cos, sin = rotation_table(positions[None], text)
    frequencies = inverse_frequencies(text.rope, text.head_dim)
    exact = positions[:, None].double() * frequencies
    assert max((cos[0] - exact.cos()).abs().max(), (sin[0] - exact.sin()).abs().max()) < 3e-7
    rounded = positions[:, None].float() * frequencies.float()
    assert (rounded.double() - exact).abs().max() > 0.4
