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

from arriero.errors import ArrieroError
from arriero.graphs.rewrite.nodes import add_constant, insert_node
from arriero.graphs.stored.codes import store_blocks, store_static
from arriero.graphs.stored.weight_store import WeightStore
from arriero.profiles.schemes import Exact, Half, Int8Static, IntBlock, Scheme, Static

FLOAT = ir.DataType.FLOAT
TYPES = {"F32": FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16}


def multiply(
    before: ir.Node,
    store: WeightStore,
    name: str,
    x: ir.Value,
    activations: str,
    new_name: str | None,
    experts: ir.Value | None = None,
) -> ir.Value:
    """Emit x f32 times the matrix `name` [N, K], stored as `new_name` if one is given; or times each tile's expert."""
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


def multiply_gathered(
    before: ir.Node, store: WeightStore, name: str, x: ir.Value, experts: ir.Value, activations: str
) -> ir.Value:
    """Emit y f32 [n, M, N] of x f32 [n, M, K] and, for each tile, one expert [n] of the stack `name` [E, K, N]."""
    return multiply(before, store, name, x, activations, None, experts)


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


def _one(before: ir.Node, dtype: ir.DataType) -> ir.Value:
    """The scale of codes that stay as they are."""
    return add_constant(before, ir.tensor(np.array(1, dtype.numpy())))
