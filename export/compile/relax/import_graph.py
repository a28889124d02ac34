"""Imports a lowered ONNX graph into Relax: TVM's ONNX importer with converters of our own.

Weights become function parameters, never constants: TVM's importer would copy each initialiser of a graph.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import tvm
from onnx_ir.passes import common as tidy
from tvm import relax
from tvm.relax.frontend.onnx import from_onnx, onnx_frontend

from arriero.export.compile.relax import kernels as kernels
from arriero.export.compile.relax import ops as ops
from arriero.graphs.functions import ADD_LORA, CACHED_ATTENTION, EXPERT_DISPATCH, ROUTE_TOKENS
from arriero.graphs.passes.bind_experts import REQUEST, TABLE
from arriero.graphs.passes.cache_in_place import ROW_STARTS
from arriero.graphs.passes.replace_linear_with_kernel import LINEAR
from arriero.graphs.passes.replace_lookup import LOOKUP
from arriero.graphs.stored.panels import EXACT

THREADS = "threads"
INDEX = "logits_index"  # the graph's input of the tokens that get logits
# Operators that read their weights at any alignment; all other code is generated for 64 bytes.
ANY_ALIGNMENT = (LINEAR, LOOKUP, ADD_LORA)
Convert = Callable[..., relax.Expr]


@dataclass(frozen=True)
class ExpertTable:
    """The input i64 [1 + E] `name` of a layer's experts: the layout of their records, and where each lies."""

    name: str
    layout: str
    records: tuple[ir.ExternalTensor, ...]


@dataclass(frozen=True)
class Imported:
    """The Relax module of a graph, the graph, its tables of experts and its weights in the order of their parameters.

    `main` takes the graph's inputs, then `threads` u8 [parts], the tables, and the weights; bf16 ones as their bits.
    """

    module: tvm.IRModule
    graph: ir.Graph
    inputs: tuple[str, ...]  # `threads` is the last
    tables: tuple[ExpertTable, ...]
    weights: tuple[ir.ExternalTensor, ...]


def import_graph(path: Path) -> Imported:
    """Import the graph at `path`."""
    model = ir.load(path)
    # the importer knows Constant nodes in their tensor form only
    tidy.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    threads = ir.Value(name=THREADS, shape=ir.Shape([THREADS]), type=ir.TensorType(ir.DataType.UINT8))
    model.graph.inputs.append(threads)
    inputs = tuple(str(value.name) for value in model.graph.inputs)
    tables = _tables_to_inputs(model.graph)
    weights = _weights_to_inputs(model.graph)
    with _our_converters(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # the checker does not know our operators; none of it is a finding
        module = from_onnx(ir.to_proto(model), dtype_dict=None, sanitize_input_names=False)
    return Imported(module, model.graph, inputs, tables, weights)


def _tables_to_inputs(graph: ir.Graph) -> tuple[ExpertTable, ...]:
    tables = []
    for node in [node for node in graph if node.op_type == TABLE]:
        value = node.outputs[0]
        records = [graph.initializers.pop(str(record.name)).const_value for record in node.inputs if record is not None]
        table = ir.Value(name=value.name, shape=value.shape, type=value.type)
        value.replace_all_uses_with(table)
        graph.remove(node, safe=True)
        graph.inputs.append(table)
        layout = node.attributes["layout"].as_string()
        external = tuple(record for record in records if isinstance(record, ir.ExternalTensor))
        assert len(external) == len(records)
        tables.append(ExpertTable(str(value.name), layout, external))
    return tuple(tables)


def _weights_to_inputs(graph: ir.Graph) -> tuple[ir.ExternalTensor, ...]:
    weights = []
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        del graph.initializers[name]
        value.const_value = None
        if tensor.dtype == ir.DataType.BFLOAT16:
            value.type = ir.TensorType(ir.DataType.UINT16)
        graph.inputs.append(value)
        weights.append(tensor)
    return tuple(weights)


def convert_linear(bb: relax.BlockBuilder, inputs: list[relax.Expr], attr: dict[str, Any], nodes: Any) -> relax.Expr:
    """Linear(x, weight, scales?)."""
    name = attr["format"].decode()
    if name == EXACT:
        form = kernels.exact_format(str(inputs[1].ty.dtype), str(inputs[1]))
    else:
        form = kernels.named_format(name, attr["block"], str(inputs[1]))
        form = form.twice() if attr["codes"] == 2 else form
    compute = kernels.linear(form, attr["features"])
    return bb.emit_te(compute, nodes[THREADS], *inputs, primfunc_name_hint="linear")


def convert_dispatch(bb: relax.BlockBuilder, inputs: list[relax.Expr], attr: dict[str, Any], nodes: Any) -> relax.Expr:
    """ExpertDispatch(x, expert_id, score, table)."""
    gate_up, down = (
        kernels.named_format(name.decode(), block, str(inputs[3]))
        for name, block in zip(attr["formats"], attr["blocks"], strict=True)
    )
    compute = kernels.dispatch(gate_up, down, attr["at"], attr["width"])
    return bb.emit_te(compute, nodes[THREADS], *inputs, primfunc_name_hint="expert_dispatch")


def convert_request(bb: relax.BlockBuilder, inputs: list[relax.Expr], attr: dict[str, Any], nodes: Any) -> relax.Expr:
    """ExpertRequest(expert_id, table)."""
    return bb.emit_te(kernels.request, *inputs, primfunc_name_hint="expert_request")


def convert_add_lora(bb: relax.BlockBuilder, inputs: list[relax.Expr], attr: dict[str, Any], nodes: Any) -> relax.Expr:
    """AddLora(x, y, adapter, A, B), whose rows lie in x and y as attention's do."""
    x, y, adapter, a, b = inputs
    arguments = (nodes[THREADS], x, y, adapter, nodes[ROW_STARTS], a, b)
    return bb.emit_te(kernels.add_lora, *arguments, primfunc_name_hint="add_lora")


def convert_attention(bb: relax.BlockBuilder, inputs: list[relax.Expr], attr: dict[str, Any], nodes: Any) -> relax.Expr:
    """CachedAttention(q, k, v, key_cache, value_cache, positions, row_starts, scales..), in place, for all tokens."""
    compute = kernels.attention(attr["num_heads"], attr["kv_heads"], attr["chunk"])
    call = bb.call_te(compute, nodes[THREADS], *inputs, nodes[INDEX], primfunc_name_hint="cached_attention")
    # `threads`, q, k, v come before the two caches; the result is new memory, of the queries' shape
    outputs = [inputs[index].ty for index in (0, 3, 4)]
    *arguments, _ = call.args[1]
    every = relax.const(np.empty(0, np.int64), "int64")
    both = bb.emit(relax.op.call_tir_inplace(call.args[0], [*arguments, every], [-1, 4, 5], outputs))
    return bb.emit(relax.TupleGetItem(both, 0))


def convert_lookup(bb: relax.BlockBuilder, inputs: list[relax.Expr], attr: dict[str, Any], nodes: Any) -> relax.Expr:
    """EmbeddingLookup(table, ids)."""
    return bb.emit_te(ops.lookup, *inputs, primfunc_name_hint="embedding_lookup")


def convert_rotary(bb: relax.BlockBuilder, inputs: list[relax.Expr], attr: dict[str, Any], nodes: Any) -> relax.Expr:
    """RotaryEmbedding(x, cos, sin) of interleaved pairs."""
    return bb.emit_te(ops.rotate(attr["num_heads"]), *inputs, primfunc_name_hint="rotary")


def convert_route(bb: relax.BlockBuilder, inputs: list[relax.Expr], attr: dict[str, Any], nodes: Any) -> relax.Expr:
    """RouteTokens(logits, forced)."""
    return bb.emit_te(ops.route(int(attr["k"][0])), *inputs, primfunc_name_hint="route")


def convert_full(bb: relax.BlockBuilder, inputs: list[relax.Expr], attr: dict[str, Any], nodes: Any) -> relax.Expr:
    """Attention(q, k, v) of 4 axes, without mask."""
    return bb.emit_te(kernels.full_attention, nodes[THREADS], *inputs, primfunc_name_hint="full_attention")


def convert_sigmoid(bb: relax.BlockBuilder, inputs: list[relax.Expr], attr: dict[str, Any], nodes: Any) -> relax.Expr:
    """Sigmoid(x)."""
    return bb.emit_te(ops.sigmoid, *inputs, primfunc_name_hint="sigmoid")


def convert_gelu(bb: relax.BlockBuilder, inputs: list[relax.Expr], attr: dict[str, Any], nodes: Any) -> relax.Expr:
    """Gelu(x), exact: the reference's towers have no other."""
    assert attr.get("approximate", b"none") == b"none"
    return bb.emit_te(ops.gelu, *inputs, primfunc_name_hint="gelu")


def convert_gather(bb: relax.BlockBuilder, inputs: list[relax.Expr], attr: dict[str, Any], nodes: Any) -> relax.Expr:
    """Gather(x, indices) along an axis; TVM's own form trusts the indices, and warns that it does."""
    return bb.emit(relax.op.take(*inputs, axis=attr.get("axis", 0), mode="clip"))


CONVERTERS: dict[str, Convert] = {
    LINEAR: convert_linear,
    LOOKUP: convert_lookup,
    REQUEST: convert_request,
    EXPERT_DISPATCH: convert_dispatch,
    ADD_LORA: convert_add_lora,
    CACHED_ATTENTION: convert_attention,
    "RotaryEmbedding": convert_rotary,
    ROUTE_TOKENS: convert_route,
    "Sigmoid": convert_sigmoid,
    "Gelu": convert_gelu,
    "Gather": convert_gather,
    "Attention": convert_full,
}


@contextlib.contextmanager
def _our_converters() -> Iterator[None]:
    """The importer has no way to register an operator, so the table that it asks for is replaced by one with ours."""
    theirs = onnx_frontend._get_convert_map
    table = theirs() | {op_type: _as_class(convert) for op_type, convert in CONVERTERS.items()}
    onnx_frontend._get_convert_map = lambda: table
    try:
        yield
    finally:
        onnx_frontend._get_convert_map = theirs


def _as_class(convert: Convert) -> type:
    def implement(bb: relax.BlockBuilder, inputs: Any, attr: dict[str, Any], params: Any) -> relax.Expr:
        return convert(bb, list(inputs), attr, params[0])

    return type("Ours", (onnx_frontend.OnnxOpConverter,), {"_impl_v1": staticmethod(implement)})
