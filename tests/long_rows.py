"""Rows of Scout's constants that are millions of tokens long, and a decoder in float64 that says what is right there.

The decoder is written out in numpy, so that it shares no code with what it judges. A row that long comes from a
snapshot with random past keys and values. Legend: S new tokens, P past slots, K key/value heads, D head size.
"""

from __future__ import annotations

import math
import platform
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from arriero.export.build_file.model_spec import model_spec
from arriero.export.compile import Device, build_kernels
from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.config import ModelConfig
from arriero.graphs.lower.part import Lowering
from arriero.graphs.trace import trace_embed, trace_text
from arriero.profiles.recipe import load_profile
from arriero.runtimes.backend import BackendOptions
from arriero.runtimes.snapshot import Snapshot, slots_held

CHUNK, LAST = 8192, 10_485_759
WINDOW = 8  # tokens
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

    def run(self, backend: Any) -> tuple[float, float]:
        """How far `backend` is from float64, relative to the largest value: logits, and keys held at the end."""
        cache = backend.new_cache(1, self.config.text.max_positions)
        cache.restore(0, self.snapshot)
        logits = []
        for piece in self.pieces():
            index = np.arange(piece.stop - piece.start)
            step = backend.forward(self.embeds[None, piece], self.positions[None, piece], cache, index)
            logits.append(step.logits[0])
        held = cache.snapshot(0).keys  # at a chunk's edge none of chunked layers
        keys = [
            (ours[:, -len(index) :], exact[piece].swapaxes(0, 1)) for ours, exact in zip(held, self.keys, strict=True)
        ]
        errors = [error(ours, exact) for ours, exact in keys if ours.size]
        return error(np.concatenate(logits), self.logits), max(errors, default=0.0)


def open_backend(name: str, toy: Path, folder: Path, kernels: Path) -> Any:
    """A toy built in float32 for the CPU backend `name` in `folder`, with TVM's `kernels`, opened with one thread."""
    config, checkpoint = ModelConfig.load(toy), Checkpoint.open(toy)
    lowering = Lowering(config, checkpoint, load_profile("fp32").assign(checkpoint.tensors), folder)
    for part, trace in (("text", trace_text), ("embed", trace_embed)):
        graph = trace(config, checkpoint, folder / "canonical" / part / f"{part}.onnx")
        import_module(f"arriero.graphs.lower.{name}").lower(part, graph, lowering)
    import_module(f"arriero.export.compile.{name}").compile_graphs(folder, ["text", "embed"], Device(kernels=kernels))
    runtime = import_module(f"arriero.runtimes.{name}")
    return runtime.open_backend(folder, model_spec(config), BackendOptions(threads=1))


def native_kernels(file: Path) -> Path:
    """TVM's kernels of this machine, compiled into `file`."""
    build_kernels.build_kernels(platform.machine(), file)
    return file


def error(ours: np.ndarray, exact: np.ndarray) -> float:
    """The largest difference, relative to the largest value."""
    return float(np.abs(ours - exact).max() / np.abs(exact).max())
