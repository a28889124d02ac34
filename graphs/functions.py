"""The custom operators of domain `ai.arriero` as ONNX: schema for the exporter, function body for a plain runtime.

A runtime that has a kernel for a node uses it; any other inlines the body, which is written for correctness on ONNX
Runtime's CPU kernels (`dispatch_functions.py`, `linear_functions.py`).
Legend: T tokens, k experts per token.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir
import onnxscript
from onnx.defs import OpSchema
from onnxscript import FLOAT, INT64, opset23
from onnxscript.values import Op

from arriero.graphs.dispatch_functions import dispatch_function, dispatch_over_linear, widened_product
from arriero.graphs.linear_functions import LINEAR_FUNCTIONS, linear_function

DOMAIN = "ai.arriero"
VERSION = 1
OPSET = 23
EXPERT_DISPATCH = "ExpertDispatch"
CACHED_ATTENTION = "CachedAttention"
ADD_LORA = "AddLora"
ROUTE_TOKENS = "RouteTokens"

_CACHED_ATTENTION_BODY = """
<domain: "ai.arriero", opset_import: ["" : 23]>
CachedAttention <num_heads, kv_heads, chunk>
    (q, k, v, past_key, past_value, positions, past_positions) => (out, present_key, present_value)
{
    zero = Constant <value_int: int = 0> ()
    one = Constant <value_int: int = 1> ()
    key_axes = Constant <value_ints: ints = [1, 2]> ()
    query_axes = Constant <value_ints: ints = [1, 3]> ()
    key_flat = Concat <axis: int = 1> (past_positions, positions)
    key_position = Unsqueeze (key_flat, key_axes)
    query_position = Unsqueeze (positions, query_axes)
    filled = GreaterOrEqual (key_position, zero)
    causal = LessOrEqual (key_position, query_position)
    past_or_now = And (filled, causal)
    chunk_size = Constant <value_int: int = @chunk> ()
    divisor = Max (chunk_size, one)
    key_chunk = Div (key_position, divisor)
    query_chunk = Div (query_position, divisor)
    same_chunk = Equal (key_chunk, query_chunk)
    unchunked = Equal (chunk_size, zero)
    near = Or (same_chunk, unchunked)
    seen = And (past_or_now, near)
    out, present_key, present_value = Attention <q_num_heads: int = @num_heads, kv_num_heads: int = @kv_heads>
        (q, k, v, seen, past_key, past_value)
}
"""

# Every row of B reads its own factors; tokens of one row lie together, whether x is [B, S, K] or [B*S, K].
_ADD_LORA_BODY = """
<domain: "ai.arriero", opset_import: ["" : 23, "com.microsoft" : 1]>
AddLora (x, y, adapter, a, b) => (sum)
{
    rows = Shape (adapter)
    rest = Constant <value_ints: ints = [-1]> ()
    width = Shape <start: int = -1> (x)
    by_row = Concat <axis: int = 0> (rows, rest, width)
    tokens = Reshape (x, by_row)
    own_a = Gather <axis: int = 0> (a, adapter)
    own_b = Gather <axis: int = 0> (b, adapter)
    low = com.microsoft.FusedMatMul <transB: int = 1> (tokens, own_a)
    high = com.microsoft.FusedMatMul <transB: int = 1> (low, own_b)
    shape = Shape (y)
    change = Reshape (high, shape)
    sum = Add (y, change)
}
"""

# Where nothing is forced, the one row of -1 that stands for all tokens is broadcast.
_ROUTE_TOKENS_BODY = """
<domain: "ai.arriero", opset_import: ["" : 23]>
RouteTokens <k> (logits, forced) => (logit, expert_id)
{
    count = Constant <value_ints: ints = @k> ()
    none = Constant <value_int: int = 0> ()
    best, own = TopK (logits, count)
    unforced = Less (forced, none)
    expert_id = Where (unforced, own, forced)
    logit = GatherElements <axis: int = -1> (logits, expert_id)
}
"""


def bodies() -> list[ir.Function]:
    """The function bodies that a canonical model or a lowered one may call, a callee before its callers."""
    dispatch = dispatch_function(EXPERT_DISPATCH, ["w"], widened_product)
    linears = [linear_function(name) for name in LINEAR_FUNCTIONS]
    dispatches = [dispatch_over_linear(name) for name in LINEAR_FUNCTIONS]
    own = (_CACHED_ATTENTION_BODY, _ADD_LORA_BODY, _ROUTE_TOKENS_BODY)
    return [_parse(text) for text in (*own, dispatch, *linears, *dispatches)]


def add_functions(model: ir.Model) -> int:
    """Give `model` the bodies of the custom operators that it calls, directly or through each other; give how many."""
    called = {node.op_type for node in model.graph if node.domain == DOMAIN}
    for body in reversed(bodies()):
        if body.name in called:
            model.functions[body.identifier()] = body
            called |= {node.op_type for node in body.all_nodes() if node.domain == DOMAIN}
    if called:
        model.opset_imports[DOMAIN] = VERSION
    return len(model.functions)


def _parse(text: str) -> ir.Function:
    return ir.serde.deserialize_function(onnx.parser.parse_function(text))


def _parameter(name: str, kind: str) -> OpSchema.FormalParameter:
    return OpSchema.FormalParameter(name, kind)


_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
_OPSET = onnxscript.values.Opset(DOMAIN, VERSION)

expert_dispatch = Op(
    _OPSET,
    EXPERT_DISPATCH,
    OpSchema(
        EXPERT_DISPATCH,
        DOMAIN,
        VERSION,
        doc="y[t] = sum_k down_e(silu(gate_e(s x)) * up_e(s x)), e = expert_id[t,k], s = score[t,k].",
        inputs=[
            _parameter("x", "T"),
            _parameter("expert_id", "tensor(int64)"),
            _parameter("score", "T"),
            _parameter("w_gate_up", "W"),
            _parameter("w_down", "W"),
        ],
        outputs=[_parameter("y", "T")],
        type_constraints=[("T", _FLOATS, "activations"), ("W", _FLOATS, "stored weights")],
    ),
)

cached_attention = Op(
    _OPSET,
    CACHED_ATTENTION,
    OpSchema(
        CACHED_ATTENTION,
        DOMAIN,
        VERSION,
        doc="Causal grouped-query attention over past and new keys by explicit positions; chunk 0 is global.",
        inputs=[
            *(_parameter(name, "T") for name in ("q", "k", "v", "past_key", "past_value")),
            *(_parameter(name, "tensor(int64)") for name in ("positions", "past_positions")),
        ],
        outputs=[_parameter(name, "T") for name in ("out", "present_key", "present_value")],
        type_constraints=[("T", _FLOATS, "activations")],
        attributes=[
            OpSchema.Attribute(name, OpSchema.AttrType.INT, "", required=True)
            for name in ("num_heads", "kv_heads", "chunk")
        ],
    ),
)


def translate_floor_divide(x: INT64, y: INT64) -> INT64:
    """Emit one Div for `//`: a position is never negative, and the exporter would also emit what rounds one down."""
    return opset23.Div(x, y)


def translate_attention(
    q: FLOAT,
    k: FLOAT,
    v: FLOAT,
    past_key: FLOAT,
    past_value: FLOAT,
    positions: INT64,
    past_positions: INT64,
    num_heads: int,
    kv_heads: int,
    chunk: int,
) -> tuple[FLOAT, FLOAT, FLOAT]:
    """Emit one CachedAttention node. The exporter would map arguments to a bare schema's attributes by the alphabet."""
    return cached_attention(
        q,
        k,
        v,
        past_key,
        past_value,
        positions,
        past_positions,
        num_heads=num_heads,
        kv_heads=kv_heads,
        chunk=chunk,
    )
