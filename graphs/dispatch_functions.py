"""Expert dispatch as ONNX functions of domain `ai.arriero`, one for each way to multiply with an expert's matrices.

Only routed experts are computed, one at a time: a Scan hands out each expert's slice of the weights without copying it,
and an expert without tokens reads none of it.
Legend: T tokens, H hidden, k experts per token, E experts, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from arriero.graphs.linear_functions import LINEAR_FUNCTIONS

# The output's name, the input's, and the names of the weight operands -> ONNX text of the product.
Product = Callable[[str, str, Sequence[str]], str]


def dispatch_function(name: str, operands: Sequence[str], product: Product) -> str:
    """The ONNX text of an expert dispatch `name`: y [T, H] of x [T, H], expert_id [T, k], score [T, k] and weights.

    `operands` are the weight inputs of one product, of which there are two: each becomes `gate_up_<operand>` and
    `down_<operand>`, stacked over E, and inside the Scan `one_<...>`, that of one expert.
    """
    gate_up, down = ([f"{matrix}_{operand}" for operand in operands] for matrix in ("gate_up", "down"))
    stacked = [*gate_up, *down]
    sliced = [f"one_{operand}" for operand in stacked]
    return f"""
<domain: "ai.arriero", opset_import: ["" : 23, "ai.arriero" : 1]>
{name} (x, expert_id, score, {", ".join(stacked)}) => (y)
{{
    zero = Constant <value_int: int = 0> ()
    one = Constant <value_int: int = 1> ()
    last = Constant <value_ints: ints = [1]> ()
    experts = Shape <start: int = 0, end: int = 1> ({stacked[0]})
    count = Squeeze (experts)
    expert_range = Range (zero, count, one)
    shape = Shape (x)
    zeros = ConstantOfShape (shape)
    start = CastLike (zeros, x)
    y = Scan <num_scan_inputs: int = {len(stacked) + 1}, body: graph = one_expert
        (sum, {", ".join(sliced)}, expert) => (next)
    {{
        chosen = Equal (expert_id, expert)
        found = NonZero (chosen)
        rows = Shape <start: int = 1, end: int = 2> (found)
        row_count = Squeeze (rows)
        routed = Greater (row_count, zero)
        next = If (routed) <
            then_branch: graph = compute () => (added)
            {{
                pairs = Transpose <perm: ints = [1, 0]> (found)
                token = Gather <axis: int = 0> (found, zero)
                scale = GatherND (score, pairs)
                scale_column = Unsqueeze (scale, last)
                scale_like = CastLike (scale_column, x)
                token_rows = Gather <axis: int = 0> (x, token)
                scaled = Mul (token_rows, scale_like)
                {product("both", "scaled", sliced[: len(gate_up)])}
                gate, up = Split <axis: int = -1, num_outputs: int = 2> (both)
                gate_sigmoid = Sigmoid (gate)
                gate_silu = Mul (gate, gate_sigmoid)
                inner = Mul (gate_silu, up)
                {product("outer", "inner", sliced[len(gate_up) :])}
                token_column = Unsqueeze (token, last)
                added = ScatterND <reduction: string = "add"> (sum, token_column, outer)
            }},
            else_branch: graph = skip () => (kept) {{ kept = Identity (sum) }}
        >
    }}> (start, {", ".join(stacked)}, expert_range)
}}
"""


def widened_product(out: str, x: str, weights: Sequence[str]) -> str:
    """The product with a matrix [K, N] in the checkpoint's dtype, widened to that of x."""
    (weight,) = weights
    return f"{weight}_wide = CastLike ({weight}, x)\n{out} = MatMul ({x}, {weight}_wide)"


def dispatch_over(linear: str) -> str:
    """The name of the dispatch whose products are the linear function `linear`: `...Linear` -> `...ExpertDispatch`."""
    return linear.removesuffix("Linear") + "ExpertDispatch"


def dispatch_over_linear(linear: str) -> str:
    """The ONNX text of the dispatch whose products are calls of the linear function `linear`."""
    return dispatch_function(
        dispatch_over(linear),
        LINEAR_FUNCTIONS[linear][0],
        lambda out, x, weights: f"{out} = ai.arriero.{linear} ({x}, {', '.join(weights)})",
    )
