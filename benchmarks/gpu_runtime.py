"""What a TensorRT bundle does on its GPU: tactics of our kernels, graphs in the place of launches, a cache that grows.

    python benchmarks/gpu_runtime.py BUNDLE [--tokens 600] [--layers layers.json]

A row of random tokens is decoded three times: as the runtime does it, where a step that comes again becomes a CUDA
graph and the cache grows; without graphs; and with a cache that has all its slots from the start. The logits of the
three are compared, and the time of a step with and without graphs is told. `--layers` gets TensorRT's own description
of the engine, of which the experts' layers are printed with the tactic that each got: 1 is decode, 2 is prefill.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arriero.runtimes.tensorrt import TensorRtBackend

PROMPT = 16


@dataclass(frozen=True)
class Decoded:
    """Of each step: logits [V], seconds and the slots of the last layer's cache."""

    logits: np.ndarray
    seconds: list[float]
    slots: list[int]


@contextmanager
def without_graphs(backend: TensorRtBackend) -> Iterator[None]:
    """No step of the text engine becomes a graph."""
    engine = backend._text
    run = engine.run
    engine.run = lambda feeds, outputs, bindings, record: run(feeds, outputs, bindings, record=False)  # type: ignore[method-assign]
    try:
        yield
    finally:
        engine.run = run  # type: ignore[method-assign]


def decode(backend: TensorRtBackend, ids: np.ndarray, reserve: bool) -> Decoded:
    """Prefill the first tokens of `ids` [T], then decode the others one by one; `reserve` all slots first."""
    cache, last = backend.new_cache(1, len(ids)), len(backend.spec.layers) - 1
    if reserve:
        cache.store.reserve(len(ids))
    logits, seconds, slots = [], [], []
    for start, stop in [(0, PROMPT), *((at, at + 1) for at in range(PROMPT, len(ids)))]:
        begun = time.perf_counter()
        embeds = backend.embed(ids[None, start:stop], np.zeros((0, backend.spec.hidden_size), np.float32))
        step = backend.forward(embeds, np.arange(start, stop)[None], cache, np.array([stop - start - 1]))
        seconds.append(time.perf_counter() - begun)
        logits.append(step.logits[0, -1])
        slots.append(cache.store.layer(last)[2])
    return Decoded(np.stack(logits), seconds[1:], slots[1:])


def compare(backend: TensorRtBackend, tokens: int) -> dict[str, Any]:
    """The three ways to decode, held against the first; microseconds are a step's median."""
    special = {backend.spec.image_token_id, *backend.spec.eos_token_ids}
    ordinary = np.array([token for token in range(backend.spec.vocab_size) if token not in special])
    ids = np.random.default_rng(0).choice(ordinary, tokens)
    made = {"graphs": decode(backend, ids, reserve=False)}
    with without_graphs(backend):
        made["no graphs"] = decode(backend, ids, reserve=False)
    made["no growth"] = decode(backend, ids, reserve=True)
    first = made["graphs"].logits
    return {
        "tokens": tokens,
        "slots": list(dict.fromkeys(made["graphs"].slots)),
        "slots_without_growth": list(dict.fromkeys(made["no growth"].slots)),
        **{
            name: {
                "microseconds": round(statistics.median(one.seconds) * 1e6, 1),
                "largest_difference": float(np.abs(one.logits - first).max()),
                "same_first_choice": float((one.logits.argmax(-1) == first.argmax(-1)).mean()),
            }
            for name, one in made.items()
        },
    }


def expert_layers(description: str) -> list[dict[str, Any]]:
    """Name and tactic of each of our plugins' layers in TensorRT's description of an engine, one per profile."""
    layers = json.loads(description).get("Layers", [])
    return [
        {key: value for key, value in layer.items() if key == "Name" or key.startswith("Tactic")}
        for layer in layers
        if isinstance(layer, dict) and "Expert" in json.dumps(layer)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what was found as JSON; 1 where graphs change a result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--tokens", type=int, default=600)
    parser.add_argument("--layers", type=Path)
    options = parser.parse_args(arguments)
    from arriero import load

    with load(options.bundle) as session:
        backend = session.backend
        assert isinstance(backend, TensorRtBackend)
        inspector = backend._text._engine.create_engine_inspector()
        description = inspector.get_engine_information(backend._trt.LayerInformationFormat.JSON)
        if options.layers:
            options.layers.write_text(description, encoding="utf-8")
        for layer in expert_layers(description):
            print(json.dumps(layer), flush=True)
        report = compare(backend, options.tokens)
    print(json.dumps(report, indent=1))
    return 1 if report["no graphs"]["largest_difference"] else 0


if __name__ == "__main__":
    sys.exit(main())
