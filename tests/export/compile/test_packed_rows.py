"""Rows that decode and one that is read share a step: which weights allow it, and that each row gets its own bits."""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("tvm", reason="needs apache-tvm: pip install 'arriero[tvm]'")

from arriero.export.build_file.model_spec import model_spec
from arriero.export.compile import Device
from arriero.export.compile.relax.kernels import FEW_OUTPUTS
from arriero.export.compile.tvm import _sums_alike, compile_graphs
from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.config import ModelConfig
from arriero.graphs.functions import ADD_LORA, DOMAIN
from arriero.graphs.lower.part import Lowering
from arriero.graphs.lower.tvm import lower
from arriero.graphs.trace import trace_embed, trace_text
from arriero.profiles.recipe import load_profile
from arriero.runtimes.tvm import TvmBackend
from tests.toys import make_scout_toy

COUNTS = np.array([1, 1, 0, 12, 1])
STARTS = [16, 40, 20, 3, 15]
LENGTH = 50


def compiled(folder, kernels, profile, **sizes):
    """The text backend of a toy in `profile`."""
    toy, out = make_scout_toy(folder / "toy", 3, vision=False, **sizes), folder / "out"
    config, checkpoint = ModelConfig.load(toy), Checkpoint.open(toy)
    schemes = load_profile(profile).rtn_baseline().assign(checkpoint.tensors)
    for part, trace in (("text", trace_text), ("embed", trace_embed)):
        lower(part, trace(config, checkpoint, folder / f"{part}.onnx"), Lowering(config, checkpoint, schemes, out))
    compile_graphs(out, ["text", "embed"], Device(kernels=kernels))
    return TvmBackend(out, model_spec(config), threads=2)


@pytest.mark.parametrize(
    ("profile", "vocabulary", "packs"),
    [
        ("int8", FEW_OUTPUTS + 1, False),  # its head stays exact
        ("int8-all", FEW_OUTPUTS + 16, True),
    ],
)
def test_a_row_has_its_own_bits_beside_others_where_the_weights_say_so(tmp_path, kernels, profile, vocabulary, packs):
    backend = compiled(tmp_path, kernels, profile, vocab_size=vocabulary)
    assert json.loads((tmp_path / "out" / "text.json").read_text())["packs"] == packs
    assert backend.packs == packs
    rows = np.random.default_rng(0).standard_normal((5, LENGTH, backend.spec.hidden_size), np.float32)
    cache, alone = backend.new_cache(5, 64), []

    def read(row, caches, start, stop):
        """Read tokens `start` to `stop` of a row, chunk by chunk of 16."""
        found = []
        for first in range(start, stop):
            if first == start or first % 16 == 0:
                last = min((first // 16 + 1) * 16, stop)
                positions = np.arange(first, last)[None]
                given = rows[row : row + 1, first:last]
                found.append(backend.forward(given, positions, caches, np.arange(last - first)).logits[0])
        return np.concatenate(found)

    for row, (start, count) in enumerate(zip(STARTS, COUNTS, strict=True)):
        single = backend.new_cache(1, 64)
        for caches in (cache.rows(row, row + 1), single):
            read(row, caches, 0, start)
        if count:
            alone.append(read(row, single, start, start + count))
    tokens = [rows[row, start : start + count] for row, (start, count) in enumerate(zip(STARTS, COUNTS, strict=True))]
    logits = backend.forward_packed(np.concatenate(tokens), COUNTS, cache, np.arange(COUNTS.sum())).logits[0]
    assert cache.lengths.tolist() == [start + count for start, count in zip(STARTS, COUNTS, strict=True)]
    if packs:
        np.testing.assert_array_equal(logits, np.concatenate(alone))
    else:
        np.testing.assert_allclose(logits, np.concatenate(alone), atol=1e-5 * np.abs(logits).max())


@pytest.mark.parametrize(("outputs", "alike"), [(FEW_OUTPUTS, True), (FEW_OUTPUTS + 1, False)])
def test_an_adapters_sums_have_one_order_where_its_outputs_are_few(outputs, alike):
    """Its factors are exact: pieces of a prompt, which may be short beside others, would be summed in two orders."""
    names = ("x", "y", "adapter", "a", "b")
    x, y, adapter, a, b = (ir.Value(name=name, shape=ir.Shape([3, outputs, 4])) for name in names)
    assert _sums_alike(ir.node(ADD_LORA, [x, y, adapter, a, b], domain=DOMAIN)) == alike
