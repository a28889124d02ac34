"""What the speed benchmark counts: bytes that a token touches, and the bandwidth of whatever buffer there is."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest

from arriero.runtimes.manifest import Manifest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def speed():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("speed")


def test_a_token_touches_the_decoder_and_its_experts_of_a_bundle(speed, workshop):
    exact, rounded = (Manifest.read(workshop / "bundles" / name) for name in ("fp32", "int8"))
    assert 0 < speed.touched_bytes(rounded) < speed.touched_bytes(exact)
    experts = sum(4 * np.prod(entry.shape) for name, entry in exact.weights.items() if ".experts." in name)
    model = exact.model
    left_out = experts * (1 - model.num_experts_per_tok / model.num_local_experts)
    whole = speed.decoder_bytes(exact.weights)
    assert whole - speed.touched_bytes(exact) == pytest.approx(left_out)


def test_a_token_reads_what_the_cache_holds_of_those_before_it(speed, workshop):
    manifest = Manifest.read(workshop / "bundles" / "fp32")
    model, chunk = manifest.model, manifest.model.attention_chunk_size
    chunked = [layer.attention for layer in model.layers].count("chunked")
    token = 2 * model.num_key_value_heads * model.head_dim * 4
    assert speed.cache_bytes(manifest, 0) == 0
    depth = 3 * chunk + 5
    assert speed.cache_bytes(manifest, depth) == token * (5 * chunked + depth * (len(model.layers) - chunked))


def test_every_reading_of_the_bandwidth_is_whole_whatever_the_threads(speed, monkeypatch):
    seen = []
    monkeypatch.setattr(speed, "read_sum", lambda probe, part: seen.append(part))
    words = np.arange(50 * speed.LINE + 1, dtype=np.uint64)[1:]
    assert speed.read_bandwidth(None, words, 3) > 0
    assert len(seen) == 3 * speed.READS
    assert sorted(np.concatenate(seen).tolist()) == np.repeat(words, speed.READS).tolist()
    assert all(len(part) % speed.LINE == 0 for part in seen)
