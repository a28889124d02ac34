"""Proves a canonical graph's invariants: what every lowering relies on, checked once, all violations listed together.

Legend: B batch, S new tokens, E experts, H hidden, F expert width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import onnx_ir as ir

from arriero.errors import ArrieroError, Problems
from arriero.graphs.config import ModelConfig
from arriero.graphs.functions import CACHED_ATTENTION, DOMAIN, EXPERT_DISPATCH
from arriero.graphs.names import EMBEDDING, TEXT_PREFIX, expected_tensors, expert_tensors
from arriero.graphs.trace import text_signature

Part = Literal["text", "vision", "embed"]
LARGEST_CONSTANT = 2**20  # bytes that may lie inside the proto

# Each graph's inputs and outputs besides the caches: name -> axes that must stay dynamic.
DYNAMIC_AXES: dict[Part, dict[str, tuple[str, ...]]] = {
    "text": {
        "inputs_embeds": ("batch", "seq"),
        "positions": ("batch", "seq"),
        "chunk_past_positions": ("batch", "chunk_past"),
        "global_past_positions": ("batch", "global_past"),
        "logits_index": ("logits",),
        "logits": ("batch", "logits"),
    },
    "vision": {"pixel_values": ("tiles",)},
    "embed": {"input_ids": ("batch", "seq"), "image_features": ("features",), "inputs_embeds": ("batch", "seq")},
}


def check(part: Part, model: ir.Model, config: ModelConfig) -> None:
    """Raise Problems unless `model` is a sound canonical graph of `part`: signature, dynamic axes, weights, operators.

    Its initialisers must be exactly the tensors of this part, each read by one node and none inside the proto; a text
    graph holds one CachedAttention per layer and one ExpertDispatch per MoE layer, with the config's sizes.
    """
    problems = [*_signature(part, model, config), *_dynamic_axes(part, model, config), *_weights(part, model, config)]
    problems += _constants(model)
    if part == "text":
        problems += [*_attentions(model, config), *_dispatches(model, config)]
    if problems:
        raise Problems(f"the {part} graph is not what the exporter promises", problems)


def part_tensors(part: Part, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the checkpoint tensors that the graph of `part` reads."""
    every = expected_tensors(config)
    if part == "embed":
        return {EMBEDDING: every[EMBEDDING]}
    if part == "vision":
        return {name: shape for name, shape in every.items() if not name.startswith(TEXT_PREFIX)}
    tied = config.text.tied_embeddings
    return {
        name: shape for name, shape in every.items() if name.startswith(TEXT_PREFIX) and (name != EMBEDDING or tied)
    }


def signature(part: Part, config: ModelConfig) -> tuple[list[str], list[str]]:
    """Names of the inputs and outputs of the canonical graph of `part`, in order."""
    if part == "vision":
        return ["pixel_values"], ["image_features"]
    if part == "embed":
        return ["input_ids", "image_features"], ["inputs_embeds"]
    return text_signature(config)


def _signature(part: Part, model: ir.Model, config: ModelConfig) -> Iterator[ArrieroError]:
    for kind, values, expected in zip(
        ("inputs", "outputs"), (model.graph.inputs, model.graph.outputs), signature(part, config), strict=True
    ):
        names = [value.name for value in values]
        if names != expected:
            missing = [name for name in expected if name not in names]
            extra = [name for name in names if name not in expected]
            yield ArrieroError(
                f"its {kind} lack {missing} and add {extra}" if missing or extra else f"its {kind} are out of order",
                where=f"{part} {kind}",
                expected=", ".join(expected[:8]) + (", ..." if len(expected) > 8 else ""),
            )


def _dynamic_axes(part: Part, model: ir.Model, config: ModelConfig) -> Iterator[ArrieroError]:
    expected_axes: dict[str, tuple[str | int, ...]] = {**DYNAMIC_AXES[part]}
    text = config.text
    if part == "text":
        for index, layer in enumerate(text.layers):
            past = "chunk_past" if layer.chunked else "global_past"
            for kind in ("past_key", "past_value"):
                expected_axes[f"{kind}.{index}"] = ("batch", text.kv_heads, past, text.head_dim)
            expected_axes[f"hidden.{index}"] = ("batch", "seq", text.hidden_size)
    for value in (*model.graph.inputs, *model.graph.outputs):
        axes = expected_axes.get(str(value.name))
        if axes is None or value.shape is None:
            continue
        shape = tuple(size.value if isinstance(size, ir.SymbolicDim) else size for size in value.shape)
        if shape[: len(axes)] != axes:
            yield ArrieroError(f"its shape is {list(shape)}", where=str(value.name), expected=f"{list(axes)}")


def _weights(part: Part, model: ir.Model, config: ModelConfig) -> Iterator[ArrieroError]:
    expected, initializers = part_tensors(part, config), model.graph.initializers
    for name, shape in expected.items():
        value = initializers.get(name)
        if value is None:
            yield ArrieroError("the graph does not read this tensor of the checkpoint", where=name)
            continue
        if value.shape is None or tuple(value.shape) != shape:
            yield ArrieroError(f"its shape is {value.shape}", where=name, expected=f"{list(shape)}")
        if not isinstance(value.const_value, ir.ExternalTensor):
            yield ArrieroError("its values lie inside the graph file", where=name, expected="external data")
        if len(value.uses()) > 1:
            readers = ", ".join(str(node.name) for node in value.consumers())
            yield ArrieroError(f"{len(value.uses())} nodes read it ({readers})", where=name, expected="exactly one")
    for name, value in initializers.items():
        if not value.uses():
            yield ArrieroError("no node reads this initialiser", where=str(name), expected="no orphans")
        elif name not in expected and isinstance(value.const_value, ir.ExternalTensor):
            yield ArrieroError(f"it is not a tensor of the {part} graph", where=str(name))


def _constants(model: ir.Model) -> Iterator[ArrieroError]:
    inside = [
        (str(value.name), value.const_value)
        for value in model.graph.initializers.values()
        if value.const_value is not None and not isinstance(value.const_value, ir.ExternalTensor)
    ]
    for node in model.graph.all_nodes():
        inside += [
            (str(node.name or node.outputs[0].name), attribute.as_tensor())
            for attribute in node.attributes.values()
            if attribute.type == ir.AttributeType.TENSOR
        ]
    for name, tensor in inside:
        if tensor.nbytes > LARGEST_CONSTANT:
            yield ArrieroError(
                f"a constant of {tensor.nbytes:,} bytes lies inside the graph file",
                where=name,
                expected=f"at most {LARGEST_CONSTANT:,} bytes; weights belong in external data",
            )


def _attentions(model: ir.Model, config: ModelConfig) -> Iterator[ArrieroError]:
    text = config.text
    nodes = _by_name(model, CACHED_ATTENTION)
    yield from _one_each(nodes, CACHED_ATTENTION, range(len(text.layers)))
    for index, layer in enumerate(text.layers):
        node = nodes.get(f"layers.{index}.{CACHED_ATTENTION}")
        if node is None:
            continue
        expected = {
            "num_heads": text.heads,
            "kv_heads": text.kv_heads,
            "chunk": text.chunk if layer.chunked else 0,
        }
        attributes = {name: attribute.as_int() for name, attribute in node.attributes.items()}
        if attributes != expected:
            yield ArrieroError(f"its attributes are {attributes}", where=str(node.name), expected=f"{expected}")
        sources = [f"past_key.{index}", f"past_value.{index}"]
        if [value.name for value in node.inputs[3:5] if value is not None] != sources:
            yield ArrieroError("it does not read its own layer's cache", where=str(node.name), expected=f"{sources}")


def _dispatches(model: ir.Model, config: ModelConfig) -> Iterator[ArrieroError]:
    text = config.text
    nodes = _by_name(model, EXPERT_DISPATCH)
    yield from _one_each(nodes, EXPERT_DISPATCH, text.moe_layers)
    for index in text.moe_layers:
        node = nodes.get(f"layers.{index}.{EXPERT_DISPATCH}")
        if node is None:
            continue
        gate_up, down = expert_tensors(index)
        expected = {
            gate_up: (text.experts, text.hidden_size, 2 * text.expert_ffn),
            down: (text.experts, text.expert_ffn, text.hidden_size),
        }
        for value, (name, shape) in zip(node.inputs[3:5], expected.items(), strict=True):
            if value is None or value.name != name:
                yield ArrieroError(
                    f"it reads {value.name if value else 'nothing'}", where=str(node.name), expected=name
                )
            elif value.shape is None or tuple(value.shape) != shape:
                yield ArrieroError(
                    f"{name} is {value.shape}", where=str(node.name), expected=f"{list(shape)} ({text.experts} experts)"
                )


def _by_name(model: ir.Model, op_type: str) -> dict[str, ir.Node]:
    return {str(node.name): node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, op_type)}


def _one_each(nodes: dict[str, ir.Node], op_type: str, layers: range | tuple[int, ...]) -> Iterator[ArrieroError]:
    expected = [f"layers.{index}.{op_type}" for index in layers]
    for name in expected:
        if name not in nodes:
            yield ArrieroError(f"layer without its {op_type} node", where=name, expected="exactly one")
    for name in nodes:
        if name not in expected:
            yield ArrieroError(f"a {op_type} node that no layer asks for", where=name)
