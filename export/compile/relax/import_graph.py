"""Imports a lowered ONNX graph into Relax: TVM's ONNX importer with converters of our own.

Weights become function parameters, never constants: TVM's importer would copy each initialiser of a graph.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import tvm
from onnx_ir.passes import common as tidy
from tvm import relax
from tvm.relax.frontend.onnx import from_onnx, onnx_frontend

from arriero.export.compile.relax import kernels as kernels
from arriero.export.compile.relax import ops as ops
from arriero.graphs.functions import ADD_LORA, CACHED_ATTENTION, EXPERT_DISPATCH
from arriero.graphs.passes.replace_linear_with_kernel import LINEAR
from arriero.graphs.passes.replace_lookup import LOOKUP

THREADS = "threads"
# Operators that read their weights at any alignment; all other code is generated for 64 bytes.
ANY_ALIGNMENT = (LINEAR, LOOKUP, EXPERT_DISPATCH, ADD_LORA)
Convert = Callable[..., relax.Expr]


def import_graph(path: Path) -> tuple[tvm.IRModule, ir.Graph, list[ir.ExternalTensor]]:
    """The Relax module of the graph at `path`, the graph, and its weights in the order of their parameters.

    Its `main` takes the graph's inputs, then `threads` u8 [parts], then the weights; bf16 ones as their bits.
    """
    model = ir.load(path)
    # the importer knows Constant nodes in their tensor form only
    tidy.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    weights = _weights_to_inputs(model)
    with _our_converters(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # the checker does not know our operators; none of it is a finding
        module = from_onnx(ir.to_proto(model), dtype_dict=None, sanitize_input_names=False)
    return module, model.graph, weights


def _weights_to_inputs(model: ir.Model) -> list[ir.ExternalTensor]:
    graph = model.graph
    threads = ir.Value(name=THREADS, shape=ir.Shape([THREADS]), type=ir.TensorType(ir.DataType.UINT8))
    graph.inputs.append(threads)
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
    return weights


def convert_linear(bb: relax.BlockBuilder, inputs: list[relax.Expr], attr: dict[str, Any], nodes: Any) -> relax.Expr:
    """Linear(x, weight, scales?)."""
    bits, block = attr["form"]
    compute = kernels.linear(_format(bits, block, inputs[1]), attr["features"])
    return bb.emit_te(compute, nodes[THREADS], *inputs, primfunc_name_hint="linear")


def convert_dispatch(bb: relax.BlockBuilder, inputs: list[relax.Expr], attr: dict[str, Any], nodes: Any) -> relax.Expr:
    """ExpertDispatch(x, expert_id, score, gate_up, scales?, down, scales?)."""
    bits, block, down_bits, down_block = attr["forms"]
    gate_up = _format(bits, block, inputs[3])
    down = _format(down_bits, down_block, inputs[5 if bits else 4])
    compute = kernels.dispatch(gate_up, down, attr["width"])
    return bb.emit_te(compute, nodes[THREADS], *inputs, primfunc_name_hint="expert_dispatch")


def convert_add_lora(bb: relax.BlockBuilder, inputs: list[relax.Expr], attr: dict[str, Any], nodes: Any) -> relax.Expr:
    """AddLora(x, y, adapter, A, B)."""
    return bb.emit_te(kernels.add_lora, nodes[THREADS], *inputs, primfunc_name_hint="add_lora")


def convert_attention(bb: relax.BlockBuilder, inputs: list[relax.Expr], attr: dict[str, Any], nodes: Any) -> relax.Expr:
    """CachedAttention(q, k, v, key_cache, value_cache, positions), in place."""
    compute = kernels.attention(attr["num_heads"], attr["kv_heads"], attr["chunk"])
    call = bb.call_te(compute, nodes[THREADS], *inputs, primfunc_name_hint="cached_attention")
    # `threads`, q, k, v come before the two caches; the result is new memory, of the queries' shape
    outputs = [inputs[index].ty for index in (0, 3, 4)]
    both = bb.emit(relax.op.call_tir_inplace(call.args[0], list(call.args[1]), [-1, 4, 5], outputs))
    return bb.emit(relax.TupleGetItem(both, 0))


def convert_lookup(bb: relax.BlockBuilder, inputs: list[relax.Expr], attr: dict[str, Any], nodes: Any) -> relax.Expr:
    """EmbeddingLookup(table, ids)."""
    return bb.emit_te(ops.lookup, *inputs, primfunc_name_hint="embedding_lookup")


def convert_rotary(bb: relax.BlockBuilder, inputs: list[relax.Expr], attr: dict[str, Any], nodes: Any) -> relax.Expr:
    """RotaryEmbedding(x, cos, sin) of interleaved pairs."""
    return bb.emit_te(ops.rotate(attr["num_heads"]), *inputs, primfunc_name_hint="rotary")


def convert_topk(bb: relax.BlockBuilder, inputs: list[relax.Expr], attr: dict[str, Any], nodes: Any) -> relax.Expr:
    """TopK(x, k) over the last axis, largest first."""
    return bb.emit_te(ops.top(int(inputs[1].value.numpy().item())), inputs[0], primfunc_name_hint="top")


def convert_full(bb: relax.BlockBuilder, inputs: list[relax.Expr], attr: dict[str, Any], nodes: Any) -> relax.Expr:
    """Attention(q, k, v) of 4 axes, without mask."""
    q, k, v = inputs
    transposed = bb.emit(relax.op.permute_dims(k, [0, 1, 3, 2]))
    return bb.emit_te(ops.full_attention, q, transposed, v, primfunc_name_hint="attention")


def convert_gather(bb: relax.BlockBuilder, inputs: list[relax.Expr], attr: dict[str, Any], nodes: Any) -> relax.Expr:
    """Gather(x, indices) along an axis; TVM's own form trusts the indices, and warns that it does."""
    return bb.emit(relax.op.take(*inputs, axis=attr.get("axis", 0), mode="clip"))


CONVERTERS: dict[str, Convert] = {
    LINEAR: convert_linear,
    LOOKUP: convert_lookup,
    EXPERT_DISPATCH: convert_dispatch,
    ADD_LORA: convert_add_lora,
    CACHED_ATTENTION: convert_attention,
    "RotaryEmbedding": convert_rotary,
    "TopK": convert_topk,
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


def _format(bits: int, block: int, weight: relax.Expr) -> kernels.Format:
    if bits and not block:
        return kernels.Format(kernels.E4M3)
    if bits:
        return kernels.Format(kernels.INTEGER_FORMATS[bits], block)
    return kernels.exact_format(str(weight.ty.dtype), str(weight))
