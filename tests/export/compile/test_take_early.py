"""The last layer is computed, but for keys and values, for the tokens alone that get logits: they get the same ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tvm", reason="needs apache-tvm: pip install 'arriero[tvm]'")

import tvm
from tvm import relax

from arriero.export.compile.relax.import_graph import import_graph
from arriero.export.compile.tvm import fuse
from tests.export.compile.test_compile_tvm import TOYS, lower
from tests.export.compile.test_packed_rows import compiled

CHUNK = 64
# logits of another order of summation where few rows are multiplied, in float32
ALIKE = {"fp32": 1e-5, "int4": 0.0}


def sizes_after_attention(module: tvm.IRModule, entry: str) -> list[set[str]]:
    """Of each tensor that `entry` of a fused module makes after its last attention, the names of its sizes."""
    bindings = [binding for block in module[entry].body.blocks for binding in block.bindings]
    calls = [isinstance(binding.value, relax.Call) and "cached_attention" in str(binding.value) for binding in bindings]
    (*_, last) = [number for number, call in enumerate(calls) if call]
    tensors = [binding.var.ty for binding in bindings[last + 1 :] if isinstance(binding.var.ty, relax.TensorType)]
    assert all(isinstance(tensor.shape, relax.ShapeExpr) for tensor in tensors)
    return [{str(size.name) for size in tensor.shape if isinstance(size, tvm.tirx.Var)} for tensor in tensors]


@pytest.mark.parametrize("toy", list(TOYS))
def test_no_other_token_goes_through_the_last_layer_s_experts(tmp_path: Path, toy: str) -> None:
    lower(TOYS[toy](tmp_path / "toy"), tmp_path / "out")
    module = fuse(import_graph(tmp_path / "out" / "text.onnx").module)
    for entry in ("step", "prompt"):
        attended, *others = sizes_after_attention(module, entry)
        assert "seq" in attended
        assert len(others) > 8
        assert not any("seq" in sizes for sizes in others)
        assert sum("logits" in sizes for sizes in others) > 8
    assert sum("seq" in sizes for sizes in sizes_after_attention(module, "main")) > 8


@pytest.mark.parametrize("profile", list(ALIKE))
def test_tokens_have_the_logits_that_they_have_among_all(tmp_path: Path, kernels: Path, profile: str) -> None:
    widths = {"intermediate_size": 64, "intermediate_size_mlp": 64}  # whole blocks of int4
    sizes = {"attention_chunk_size": CHUNK, "max_position_embeddings": 2 * CHUNK}
    backend = compiled(tmp_path, kernels, profile, **sizes, **widths)
    draw = np.random.default_rng(1)
    steps = [(1, 1, [0]), (20, 1, [0]), (1, 12, [11])]  # rows, the tokens of each, and those that get logits
    steps += [(1, 50, wanted) for wanted in ([49], [0], [20], [31, 7, 30])]
    for batch, count, wanted in steps:
        given = draw.standard_normal((batch, count, backend.spec.hidden_size), np.float32)
        positions = np.tile(np.arange(count), (batch, 1))
        every, some = (
            backend.forward(given, positions, backend.new_cache(batch, CHUNK), np.array(index), captures)
            for index, captures in ((range(count), True), (wanted, False))
        )
        assert some.logits.shape == (batch, len(wanted), backend.spec.vocab_size)
        np.testing.assert_allclose(some.logits, every.logits[:, wanted], rtol=0, atol=ALIKE[profile])
        assert count == 1 or not np.allclose(every.logits[:, 0], every.logits[:, -1])


def test_of_several_rows_each_token_is_taken_from_its_own(tmp_path: Path, kernels: Path) -> None:
    backend = compiled(tmp_path, kernels, "int4", intermediate_size=64, intermediate_size_mlp=64)
    counts = np.array([1, 14, 1, 10])
    given = np.random.default_rng(2).standard_normal((counts.sum(), backend.spec.hidden_size), np.float32)
    last = np.cumsum(counts) - 1
    every, some = (
        backend.forward_packed(given, counts, backend.new_cache(4, 16), index, captures).logits
        for index, captures in ((np.arange(len(given)), True), (last, False))
    )
    np.testing.assert_array_equal(some, every[:, last])
