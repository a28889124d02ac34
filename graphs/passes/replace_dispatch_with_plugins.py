"""Replaces ExpertDispatch by the two nodes of our own CUDA kernels: ExpertGateUp and ExpertDown of domain `arriero`.

The nodes are plugins compiled ahead of time into the engine; their layouts of weights are the kernels' own. Case 1,
16-bit floats: rows of output features, plain, and one scale that nothing reads. Case 2, int4 in blocks: packed rows
with a float32 scale per block.
Legend: T tokens, k experts per token, E experts, N output and K input features of an expert's matrix.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from arriero.graphs.functions import EXPERT_DISPATCH
from arriero.graphs.passes.become import become, constant, insert
from arriero.graphs.passes.multiply_in_scheme import FLOAT, TYPES
from arriero.graphs.passes.store_codes import rounded_experts
from arriero.graphs.passes.store_weights import HALVES, WeightStore, narrow
from arriero.graphs.weights import Spec
from arriero.profiles.schemes import Half, IntBlock, Scheme

PLUGINS = "arriero"
GATE_UP, DOWN = "ExpertGateUp", "ExpertDown"
INT32 = int(ir.DataType.INT32)
BLOCKS = (32, 64, 128)  # those that the kernels read


def replace_dispatch_with_plugins(model: ir.Model, store: WeightStore, activations: str) -> int:
    """Rewrite every ExpertDispatch whose experts the kernels read; give how many. Others are left as they are.

    ExpertGateUp(x [T, H], expert_id i32 [T, k], score f32 [T, k], gate_up, scales) -> inner [T*k, F];
    ExpertDown(inner, expert_id, down, scales) -> [T, H]. Attributes: `form` of the weights (exact, int4), and `aot`,
    which asks for the kind of plugin that needs no Python. `activations`: F16 or BF16; in float32 there is no kernel.
    """
    count = 0
    for node in [node for node in model.graph if node.op_type == EXPERT_DISPATCH]:
        x, expert_id, score, *stacks = node.inputs
        names = [str(value.name) for value in stacks if value is not None]
        schemes = [store.schemes[name] for name in names]
        if activations == "F32" or not all(_read(scheme, activations) for scheme in schemes):
            continue
        dtype = int(TYPES[activations])
        first, second = (_weights(node, store, name, scheme) for name, scheme in zip(names, schemes, strict=True))
        narrowed = insert(node, "Cast", [x], to=dtype)
        chosen = insert(node, "Cast", [expert_id], to=INT32)
        inner = ir.node(GATE_UP, [narrowed, chosen, score, *first], _attributes(schemes[0]), domain=PLUGINS)
        outer = ir.node(DOWN, [inner.outputs[0], chosen, *second], _attributes(schemes[1]), domain=PLUGINS)
        model.graph.insert_before(node, [inner, outer])
        become(node, "Cast", [outer.outputs[0]], {"to": int(FLOAT)}, domain="")
        count += 1
    if count:
        model.opset_imports[PLUGINS] = 1
    return count


def _read(scheme: Scheme, activations: str) -> bool:
    if isinstance(scheme, Half):
        return scheme.label.upper() == activations
    return isinstance(scheme, IntBlock) and (scheme.bits, scheme.accuracy_level) == (4, 0) and scheme.block in BLOCKS


def _attributes(scheme: Scheme) -> dict[str, str | int]:
    return {"plugin_namespace": PLUGINS, "form": "int4" if isinstance(scheme, IntBlock) else "exact", "aot": 1}


def _weights(node: ir.Node, store: WeightStore, name: str, scheme: Scheme) -> list[ir.Value]:
    """The weights of the stack `name` [E, K, N], output features first, and their scales."""
    experts, features, outputs = store.checkpoint.tensors[name].shape
    if isinstance(scheme, IntBlock):
        return _packed(store, name, scheme)
    label = scheme.label.upper()

    def pieces() -> Iterator[tuple[np.ndarray]]:
        for expert in range(experts):
            rows = store.checkpoint.read_float32(name, expert, expert + 1)[0].T
            yield (narrow(np.ascontiguousarray(rows), HALVES[label], name).view(np.uint16)[None],)

    rows = store.promise([Spec(f"{name}.rows", label, (experts, outputs, features))], scheme.label, pieces)
    return [*rows, constant(node, ir.tensor(np.ones(1, np.float32)))]


def _packed(store: WeightStore, name: str, scheme: IntBlock) -> list[ir.Value]:
    # Imported here: only engines with our own kernels have this layout.
    from arriero.profiles.lanes import pack_lanes, row_words

    experts, features, outputs = store.checkpoint.tensors[name].shape
    specs = [
        Spec(f"{name}.packed", "I32", (experts, outputs, row_words(scheme.bits, features))),
        Spec(f"{name}.scales", "F32", (experts, outputs, features // scheme.block)),
    ]

    def pieces() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for found in rounded_experts(store, name, scheme):
            yield pack_lanes(found)[None], found.scales[None]

    return store.promise(specs, scheme.label, pieces)
