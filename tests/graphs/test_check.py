"""Each invariant of the canonical graph, broken on purpose, is found and named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from arriero.errors import Problems
from arriero.graphs.check import LARGEST_CONSTANT, check, part_tensors
from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.config import ModelConfig
from arriero.graphs.names import expected_tensors
from arriero.graphs.trace import trace_embed, trace_text
from tests.toys import make_maverick_toy, make_scout_toy

LAYER = "language_model.model.layers.1"


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> tuple[ir.Model, ModelConfig]:
    folder = tmp_path_factory.mktemp("check")
    toy = make_maverick_toy(folder / "toy", 1)
    config = ModelConfig.load(toy)
    return trace_text(config, Checkpoint.open(toy), folder / "text.onnx"), config


def find(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if node.name == name)


def second_dispatch(model: ir.Model) -> None:
    node = find(model, "layers.1.ExpertDispatch")
    twin = ir.Node(node.domain, node.op_type, node.inputs, name="layers.2.ExpertDispatch")
    model.graph.insert_after(node, twin)


def no_dispatch(model: ir.Model) -> None:
    find(model, "layers.1.ExpertDispatch").op_type = "Other"


def no_attention(model: ir.Model) -> None:
    find(model, "layers.2.CachedAttention").op_type = "Other"


def wrong_chunk(model: ir.Model) -> None:
    find(model, "layers.3.CachedAttention").attributes["chunk"] = ir.AttrInt64("chunk", 16)


def swapped_caches(model: ir.Model) -> None:
    node = find(model, "layers.0.CachedAttention")
    key, value = node.inputs[3:5]
    node.replace_input_with(3, value)
    node.replace_input_with(4, key)


def swapped_experts(model: ir.Model) -> None:
    one, three = find(model, "layers.1.ExpertDispatch"), find(model, "layers.3.ExpertDispatch")
    first, second = one.inputs[4], three.inputs[4]
    one.replace_input_with(4, second)
    three.replace_input_with(4, first)


def fewer_experts(model: ir.Model) -> None:
    value = model.graph.initializers[f"{LAYER}.feed_forward.experts.down_proj"]
    value.shape = ir.Shape([64, 32, 64])


def orphan(model: ir.Model) -> None:
    value = ir.Value(name="left.over", const_value=ir.tensor(np.zeros(3, np.float32), name="left.over"))
    model.graph.initializers["left.over"] = value


def read_twice(model: ir.Model) -> None:
    value = model.graph.initializers[f"{LAYER}.input_layernorm.weight"]
    model.graph.append(ir.node("Identity", [value], name="twice"))


def inside(model: ir.Model) -> None:
    value = model.graph.initializers[f"{LAYER}.input_layernorm.weight"]
    value.const_value = ir.tensor(np.zeros(64, np.float16), name=value.name)


def not_read(model: ir.Model) -> None:
    value = model.graph.initializers.pop(f"{LAYER}.input_layernorm.weight")
    value.name = "renamed"
    model.graph.initializers["renamed"] = value


def big_constant(model: ir.Model) -> None:
    tensor = ir.tensor(np.zeros(LARGEST_CONSTANT // 4 + 1, np.float32))
    model.graph.append(ir.node("Constant", [], {"value": tensor}, name="huge"))


def static_batch(model: ir.Model) -> None:
    model.graph.inputs[0].shape = ir.Shape([2, "seq", 64])


def static_past(model: ir.Model) -> None:
    next(value for value in model.graph.inputs if value.name == "past_key.3").shape = ir.Shape(["batch", 2, 7, 16])


def missing_output(model: ir.Model) -> None:
    model.graph.outputs.remove(next(value for value in model.graph.outputs if value.name == "hidden.2"))


def reordered_inputs(model: ir.Model) -> None:
    model.graph.inputs.append(model.graph.inputs.pop(0))


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (second_dispatch, ["layers.2.ExpertDispatch: a ExpertDispatch node that no layer asks for"]),
        (no_dispatch, ["layers.1.ExpertDispatch: layer without"]),
        (no_attention, ["layers.2.CachedAttention: layer without"]),
        (wrong_chunk, ["layers.3.CachedAttention: its attributes are", "'chunk': 0"]),
        (swapped_caches, ["layers.0.CachedAttention: it does not read its own layer's cache", "past_key.0"]),
        (swapped_experts, [f"expected {LAYER}.feed_forward.experts.down_proj"]),
        (fewer_experts, ["layers.1.ExpertDispatch", "[128, 32, 64] (128 experts)"]),
        (orphan, ["left.over: no node reads this initialiser"]),
        (read_twice, [f"{LAYER}.input_layernorm.weight: 2 nodes read it", "twice"]),
        (inside, [f"{LAYER}.input_layernorm.weight: its values lie inside the graph file"]),
        (not_read, [f"{LAYER}.input_layernorm.weight: the graph does not read", "renamed: it is not a tensor"]),
        (big_constant, ["huge: a constant of 1,048,580 bytes lies inside"]),
        (static_batch, ["inputs_embeds: its shape is [2, 'seq', 64]"]),
        (static_past, ["past_key.3: its shape is", "'global_past'"]),
        (missing_output, ["text outputs: its outputs lack ['hidden.2'] and add []"]),
        (reordered_inputs, ["text inputs: its inputs are out of order"]),
    ],
)
def test_a_broken_invariant_is_named(
    traced: tuple[ir.Model, ModelConfig], break_it: Callable[[ir.Model], None], words: list[str]
) -> None:
    model, config = traced[0].clone(), traced[1]
    break_it(model)
    with pytest.raises(Problems) as caught:
        check("text", model, config)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_config_with_another_expert_count_is_found(traced: tuple[ir.Model, ModelConfig]) -> None:
    config = replace(traced[1], text=replace(traced[1].text, experts=64))
    with pytest.raises(Problems, match="64 experts"):
        check("text", traced[0], config)


def test_the_parts_share_out_every_tensor(tmp_path: Path) -> None:
    config = ModelConfig.load(make_scout_toy(tmp_path, 0))
    shares = [part_tensors(part, config) for part in ("text", "vision", "embed")]
    assert sum(map(len, shares)) == len(expected_tensors(config))
    assert {name for share in shares for name in share} == set(expected_tensors(config))


def test_another_part_is_not_mistaken(tmp_path: Path) -> None:
    toy = make_scout_toy(tmp_path / "toy", 0)
    config = ModelConfig.load(toy)
    model = trace_embed(config, Checkpoint.open(toy), tmp_path / "embed.onnx")
    with pytest.raises(Problems):
        check("vision", model, config)
