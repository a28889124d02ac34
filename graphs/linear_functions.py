"""Linear layers over eight-bit weights as ONNX functions of domain `ai.arriero`, for runtimes without such a kernel.

Activations are x [.., K]; every form is symmetric and has one scale per output feature. Integers are stored as q + 128,
weights and activations alike: ONNX Runtime multiplies u8 by s8 with saturating 16-bit sums on x86-64 CPUs without VNNI,
and s8 by s8 with no vector code, but u8 by u8 exactly everywhere. Legend: N output features, K input features.
"""

from __future__ import annotations

# The weights stay f8 in memory: ONNX Runtime folds a Cast of an initialiser into a float32 copy at load, but not this.
_FLOAT8_WEIGHTS = "wide = DequantizeLinear <axis: int = 0> (w, w_scales)"
_FLOAT8_PRODUCT = "com.microsoft.FusedMatMul <transB: int = 1>"

# No token's scale is 0; what is smaller than this vanishes.
_TOKEN_SCALE = """
    last = Constant <value_ints: ints = [-1]> ()
    least = Constant <value_float: float = 1e-30> ()
    magnitudes = Abs (x)
    largest = ReduceMax <keepdims: int = 1> (magnitudes, last)
    bounded = Max (largest, least)
    top = Constant <value_float: float = {top}> ()
    token_scale = Div (bounded, top)
    shrunk = Div (x, token_scale)
"""

_INT8_PRODUCT = """
    half = Constant <value: tensor = uint8 {128}> ()
    unit = Constant <value: tensor = float {1}> ()
    integers = QuantizeLinear (shrunk, unit, half)
    sums = MatMulInteger (integers, w, half, half)
    product = Cast <to: int = 1> (sums)
"""

# Name of the function -> its weight operands after x, and how y [.., N] follows from them.
LINEAR_FUNCTIONS = {
    # w f8 [N, K], w_scales [N]; each token's activations rounded to E4M3 at its own scale
    "Float8Linear": (
        ("w", "w_scales"),
        f"""
    {_TOKEN_SCALE.replace("{top}", "448.0")}
    rounded = Cast <to: int = 17, saturate: int = 1> (shrunk)
    values = Cast <to: int = 1> (rounded)
    {_FLOAT8_WEIGHTS}
    product = {_FLOAT8_PRODUCT} (values, wide)
    y = Mul (product, token_scale)
""",
    ),
    # the same weights, activations in float32
    "Float8WeightLinear": (
        ("w", "w_scales"),
        f"""
    {_FLOAT8_WEIGHTS}
    y = {_FLOAT8_PRODUCT} (x, wide)
""",
    ),
    # w u8 [K, N], w_scales [N]; each token's activations rounded to int8 at its own scale
    "Int8DynamicLinear": (
        ("w", "w_scales"),
        f"""
    {_TOKEN_SCALE.replace("{top}", "127.0")}
    {_INT8_PRODUCT}
    scales = Mul (token_scale, w_scales)
    y = Mul (product, scales)
""",
    ),
    # w u8 [K, N], w_scales [N] (with the activations' scale in them), w_multiplier [K]; activations rounded to int8
    "Int8StaticLinear": (
        ("w", "w_scales", "w_multiplier"),
        f"""
    least = Constant <value_float: float = -127.0> ()
    top = Constant <value_float: float = 127.0> ()
    multiplied = Mul (x, w_multiplier)
    shrunk = Clip (multiplied, least, top)
    {_INT8_PRODUCT}
    y = Mul (product, w_scales)
""",
    ),
}


def linear_function(name: str) -> str:
    """The ONNX text of the linear function `name`: y [.., N] of x [.., K] and the weight operands."""
    operands, body = LINEAR_FUNCTIONS[name]
    return f"""
<domain: "ai.arriero", opset_import: ["" : 23, "com.microsoft" : 1]>
{name} (x, {", ".join(operands)}) => (y)
{{ {body} }}
"""
