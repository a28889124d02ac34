"""Multiplies with checkpoint matrices by standard operators, in the precision that each one's scheme asks for.

What goes in and comes out is float32; only the product in between is narrow, so that norms, router, softmax, rotation
and the residual stream never are. Every operator is one that a strongly typed compiler takes at its word:
Case 1, exact: MatMul in float32.
Case 2, 16-bit floats: both sides cast, MatMul in them.
Case 3, int4 in blocks: DequantizeLinear over blocks into the activations' dtype, MatMul in that.
Case 4, static eight bits: the inputs times their multiplier are rounded at scale 1, the sums scaled per output.
A stack of experts is read by Gather after DequantizeLinear, at scale 1: integer types may be read by nothing else, and
a compiler moves the Gather ahead, so that only the gathered experts' codes are touched.
Legend: N output features, K input features, E experts, n tiles of M tokens.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.passes import Sequential
from onnx_ir.passes import common as tidy

from arriero.errors import ArrieroError
from arriero.graphs.passes.replace_linear import TIED, linear_weight
from arriero.graphs.rewrite import add_constant, insert_node, replace_node
from arriero.graphs.stored.codes import store_blocks, store_static
from arriero.graphs.stored.weight_store import WeightStore
from arriero.profiles.schemes import Exact, Half, Int8Static, IntBlock, Scheme, Static

FLOAT = ir.DataType.FLOAT
TYPES = {"F32": FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16}


def multiply_in_scheme(model: ir.Model, store: WeightStore, activations: str) -> int:
    """Rewrite each product with a matrix [N, K] of the checkpoint; give how many. `activations`: F32, F16 or BF16."""
    count = 0
    for node in list(model.graph):
        name = linear_weight(node, store.checkpoint.tensors)
        if name is None:
            continue
        x = node.inputs[0]
        assert x is not None
        out = _multiply(node, store, name, x, activations, TIED.get(name))
        replace_node(node, "Identity", [out], {}, domain="")
        count += 1
    return count


def sum_products(model: ir.Model) -> int:
    """Write each float32 MatMul with a turned matrix [N, K] as products and their sums; give how many.

    For GPUs without float32 matrix products, where what is left of them (the router) is small.
    """
    count = 0
    for node in list(model.graph):
        turned = node.inputs[1].producer() if node.op_type == "MatMul" and node.inputs[1] is not None else None
        if turned is None or turned.op_type != "Transpose" or turned.inputs[0] is None:
            continue
        weight = turned.inputs[0]
        if not weight.is_initializer() or weight.dtype != FLOAT:
            continue
        rows = insert_node(node, "Unsqueeze", [node.inputs[0], add_constant(node, [-2])])  # [.., 1, K]
        replace_node(
            node,
            "ReduceSum",
            [insert_node(node, "Mul", [rows, weight]), add_constant(node, [-1])],
            {"keepdims": 0},
            domain="",
        )
        count += 1
    return count


def multiply_gathered(
    before: ir.Node, store: WeightStore, name: str, x: ir.Value, experts: ir.Value, activations: str
) -> ir.Value:
    """Emit y f32 [n, M, N] of x f32 [n, M, K] and, for each tile, one expert [n] of the stack `name` [E, K, N]."""
    return _multiply(before, store, name, x, activations, None, experts)


def keep_half(model: ir.Model, store: WeightStore) -> int:
    """Store what is left of Half tensors (biases, tables, the embedding) in 16 bits, Casts in place; give how many."""
    Sequential(tidy.RemoveUnusedNodesPass())(model)  # what the products have no more use for is not left over
    count = 0
    for name, value in list(model.graph.initializers.items()):
        left = name in store.checkpoint.tensors and name not in store.table and value.uses()
        if left and isinstance(store.schemes[name], Half):
            # under another name, so that no later pass takes it for the checkpoint's own
            half = store.half(name, f"{name}.half")
            for user in value.consumers():
                if user.op_type != "Cast":  # a Gather's rows
                    user.outputs[0].type = half.type
            value.replace_all_uses_with(half)
            count += 1
    return count


def round_inputs(
    before: ir.Node, scheme: Static, x: ir.Value, multiplier: ir.Value, dtype: ir.DataType = FLOAT
) -> ir.Value:
    """Emit the codes that x f32 times its multiplier is rounded to, as numbers of `dtype`, which holds them exactly."""
    multiplied = insert_node(before, "Mul", [x, multiplier])
    if isinstance(scheme, Int8Static):  # the operator would saturate at -128
        ends = [add_constant(before, ir.tensor(np.array(end, np.float32))) for end in (-127, 127)]
        multiplied = insert_node(before, "Clip", [multiplied, *ends])
    zero = np.array(0, np.int8 if isinstance(scheme, Int8Static) else ml_dtypes.float8_e4m3fn)
    none = add_constant(before, ir.tensor(zero))
    rounded = insert_node(before, "QuantizeLinear", [multiplied, _one(before, FLOAT), none])
    return insert_node(before, "DequantizeLinear", [rounded, _one(before, dtype), none])


def _one(before: ir.Node, dtype: ir.DataType) -> ir.Value:
    """The scale of codes that stay as they are."""
    return add_constant(before, ir.tensor(np.array(1, dtype.numpy())))


def _multiply(
    before: ir.Node,
    store: WeightStore,
    name: str,
    x: ir.Value,
    activations: str,
    new_name: str | None,
    experts: ir.Value | None = None,
) -> ir.Value:
    scheme: Scheme = store.schemes[name]
    if isinstance(scheme, Static):  # case 4
        return _static(before, store, name, x, scheme, new_name, experts)
    dtype = FLOAT
    if isinstance(scheme, Exact):  # case 1
        weight = store.exact(name, new_name)
    elif isinstance(scheme, Half):  # case 2
        weight, dtype = store.half(name, new_name), TYPES[scheme.label.upper()]
    elif isinstance(scheme, IntBlock) and scheme.bits == 4:  # case 3
        codes, scales = store_blocks(store, name, activations, new_name)
        weight = insert_node(before, "DequantizeLinear", [codes, scales], axis=1, block_size=scheme.block)
        dtype = TYPES[activations]
    else:
        raise ArrieroError(f"no standard operator multiplies with {scheme.description}", where=name)
    if dtype != FLOAT:
        x = insert_node(before, "Cast", [x], to=int(dtype))
    product = insert_node(before, "MatMul", [x, _taken(before, weight, experts)])
    return product if dtype == FLOAT else insert_node(before, "Cast", [product], to=int(FLOAT))


def _static(
    before: ir.Node,
    store: WeightStore,
    name: str,
    x: ir.Value,
    scheme: Static,
    new_name: str | None,
    experts: ir.Value | None,
) -> ir.Value:
    codes, scales, multiplier = store_static(store, name, new_name)
    if experts is not None:
        multiplier, scales = (_per_tile(before, value, experts) for value in (multiplier, scales))
    inputs = round_inputs(before, scheme, x, multiplier)
    if experts is None:
        weight = insert_node(before, "DequantizeLinear", [codes, scales], axis=0)
        return insert_node(before, "MatMul", [inputs, _taken(before, weight, None)])
    weight = insert_node(before, "DequantizeLinear", [codes, _one(before, FLOAT)])
    return insert_node(
        before, "Mul", [insert_node(before, "MatMul", [inputs, _taken(before, weight, experts)]), scales]
    )


def _taken(before: ir.Node, weight: ir.Value, experts: ir.Value | None) -> ir.Value:
    """The right side of the product: a matrix [N, K] turned, or each tile's expert [n, K, N] of a stack."""
    if experts is None:
        return insert_node(before, "Transpose", [weight], perm=[1, 0])
    return insert_node(before, "Gather", [weight, experts], axis=0)


def _per_tile(before: ir.Node, values: ir.Value, experts: ir.Value) -> ir.Value:
    """Rows [E, ..] of each tile's expert as [n, 1, ..]."""
    return insert_node(
        before, "Unsqueeze", [insert_node(before, "Gather", [values, experts], axis=0), add_constant(before, [1])]
    )
