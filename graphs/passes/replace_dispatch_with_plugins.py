"""Replaces ExpertDispatch by the two nodes of our own CUDA kernels: ExpertGateUp and ExpertDown of domain `arriero`.

The nodes are plugins compiled ahead of time into the engine; their layouts of weights are the kernels' own. Case 1,
16-bit floats: rows of output features, plain, and one scale that nothing reads. Case 2, int4 in blocks: packed rows
with a float32 scale per block. Case 3, static eight bits beside float16: packed rows with a float32 scale per output,
and inputs that the graph rounds to codes; as an expert has a range of its own for the inputs that the score has scaled,
each pair goes into ExpertGateUp as a token of its own, with score 1.
Between the two nodes float16 values are scaled by INNER_SCALES; ExpertDown undoes it in cases 1 and 2, the stored
multiplier of its inputs in case 3.
Legend: T tokens, k experts per token, P = T k pairs, E experts, N output and K input features of an expert's matrix.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from arriero.graphs.functions import EXPERT_DISPATCH
from arriero.graphs.rewrite.misses import miss
from arriero.graphs.rewrite.nodes import add_constant, insert_node, replace_node
from arriero.graphs.rewrite.scheme_products import FLOAT, TYPES, round_inputs
from arriero.graphs.rewrite.topk_rows import scale_inputs
from arriero.graphs.stored.codes import Arrays, rounded_experts, static_experts
from arriero.graphs.stored.expert_plugins import BLOCKS, DOMAIN, DOWN, GATE_UP, INNER_SCALES
from arriero.graphs.stored.mma_layout import pack_byte_lanes, pack_int4_lanes, row_words
from arriero.graphs.stored.safetensors_writer import Spec
from arriero.graphs.stored.weight_store import HALVES, WeightStore, narrow
from arriero.profiles.schemes import Half, IntBlock, Scheme, Static

INT32 = int(ir.DataType.INT32)


def replace_dispatch_with_plugins(model: ir.Model, store: WeightStore, activations: str) -> int:
    """Rewrite every ExpertDispatch whose experts the kernels read; give how many. Others are left as they are.

    ExpertGateUp(x [T, H], expert_id i32 [T, k], score f32 [T, k], gate_up, scales) -> inner [P, F];
    ExpertDown(inner, expert_id, down, scales) -> [T, H]. Attributes: `form`, exact, int4, int8 or fp8, and `aot`, which
    asks for the kind of plugin that needs no Python. `activations`: F16 or BF16; in float32 there is no kernel.
    """
    count = 0
    for node in [node for node in model.graph if node.op_type == EXPERT_DISPATCH]:
        x, expert_id, score, *stacks = node.inputs
        names = [str(value.name) for value in stacks if value is not None]
        gate_up, down = (store.schemes[name] for name in names)
        forms = [form for form in (plugin_form(scheme, activations) for scheme in (gate_up, down)) if form is not None]
        if len(forms) < len(names):
            schemes = f"{gate_up.description} and {down.description}"
            miss(node, EXPERT_DISPATCH, f"no kernel takes {schemes} beside {activations} activations")
            continue
        assert expert_id is not None
        assert expert_id.shape is not None
        per_token, hidden = expert_id.shape[1], store.checkpoint.tensors[names[0]].shape[1]
        assert isinstance(per_token, int)
        chosen = insert_node(node, "Cast", [expert_id], to=INT32)
        pairs = insert_node(node, "Reshape", [chosen, add_constant(node, [-1])])  # [P]
        weights, scales, *multiplier = _weights(node, store, names[0], gate_up)
        if isinstance(gate_up, Static):  # case 3
            scaled = scale_inputs(node, x, score, per_token, hidden)
            column = insert_node(node, "Unsqueeze", [pairs, add_constant(node, [1])])
            one = add_constant(node, ir.tensor(np.array(1, np.float32)))
            ones = insert_node(node, "Expand", [one, insert_node(node, "Shape", [column])])
            routed: list[ir.Value | None] = [_codes(node, gate_up, scaled, multiplier[0], pairs), column, ones]
        else:
            routed = [insert_node(node, "Cast", [x], to=int(TYPES[activations])), chosen, score]
        inner = _plugin(node, GATE_UP, [*routed, weights, scales], forms[0])
        weights, scales, *multiplier = _weights(node, store, names[1], down, INNER_SCALES[activations])
        if isinstance(down, Static):  # case 3
            inner = _codes(node, down, insert_node(node, "Cast", [inner], to=int(FLOAT)), multiplier[0], pairs)
        outer = _plugin(node, DOWN, [inner, chosen, weights, scales], forms[1])
        replace_node(node, "Cast", [outer], {"to": int(FLOAT)}, domain="")
        count += 1
    if count:
        model.opset_imports[DOMAIN] = 1
    return count


def plugin_form(scheme: Scheme, activations: str) -> str | None:
    """The kernels' form for a scheme beside `activations`; None where there is none."""
    if isinstance(scheme, Half):
        return "exact" if scheme.label.upper() == activations else None
    if isinstance(scheme, Static):
        return scheme.word if activations == "F16" else None
    read = isinstance(scheme, IntBlock) and (scheme.bits, scheme.accuracy_level) == (4, 0) and scheme.block in BLOCKS
    return "int4" if read and activations != "F32" else None


def _plugin(node: ir.Node, kind: str, inputs: list[ir.Value | None], form: str) -> ir.Value:
    plugin = ir.node(kind, inputs, {"plugin_namespace": DOMAIN, "form": form, "aot": 1}, domain=DOMAIN)
    assert node.graph is not None
    node.graph.insert_before(node, plugin)
    return plugin.outputs[0]


def _codes(node: ir.Node, scheme: Static, x: ir.Value, multiplier: ir.Value, pairs: ir.Value) -> ir.Value:
    """The codes f16 [P, K] of x f32 [P, K], each pair's by the multipliers [E, K] of its expert."""
    return round_inputs(node, scheme, x, insert_node(node, "Gather", [multiplier, pairs], axis=0), TYPES["F16"])


def _weights(node: ir.Node, store: WeightStore, name: str, scheme: Scheme, inputs_scale: float = 1.0) -> list[ir.Value]:
    """The stack `name` [E, K, N], output features first, and its scales; in case 3 multipliers of its inputs, too,
    which come as `inputs_scale` of what they are."""
    experts, features, outputs = store.checkpoint.tensors[name].shape
    if isinstance(scheme, Half):  # case 1
        label = scheme.label.upper()

        def rows() -> Iterator[Arrays]:
            for expert in range(experts):
                turned = np.ascontiguousarray(store.checkpoint.read_float32(name, expert, expert + 1)[0].T)
                yield (narrow(turned, HALVES[label], name).view(np.uint16)[None],)

        plain = store.promise([Spec(f"{name}.rows", label, (experts, outputs, features))], scheme.label, rows)
        return [*plain, add_constant(node, ir.tensor(np.ones(1, np.float32)))]
    if isinstance(scheme, IntBlock):  # case 2
        specs = [
            Spec(f"{name}.packed", "I32", (experts, outputs, row_words(scheme.bits, features))),
            Spec(f"{name}.scales", "F32", (experts, outputs, features // scheme.block)),
        ]

        def blocks() -> Iterator[Arrays]:
            for rounded in rounded_experts(store, name, scheme):
                yield pack_int4_lanes(rounded)[None], rounded.scales[None]

        return store.promise(specs, scheme.label, blocks)
    assert isinstance(scheme, Static)  # case 3
    specs = [
        Spec(f"{name}.packed", "I32", (experts, outputs, row_words(8, features))),
        Spec(f"{name}.scales", "F32", (experts, outputs)),
        Spec(f"{name}.multiplier", "F32", (experts, features)),
    ]

    def channels() -> Iterator[Arrays]:
        for codes, factors, multiplier in static_experts(store, name, scheme):
            yield pack_byte_lanes(codes)[None], factors[None], multiplier[None] / np.float32(inputs_scale)

    return store.promise(specs, scheme.label, channels)
