"""Integer products on ONNX Runtime are exact on this processor, with or without VNNI, at the largest numbers too."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
from onnx import numpy_helper, parser

from arriero.runtimes.onnxruntime import session_options

ROWS, FEATURES, OUTPUTS = 5, 200, 40
# Bundles for ONNX Runtime hold q + 128 and multiply u8 by u8.
U8_BY_U8 = """
    half = Constant <value: tensor = uint8 {128}> ()
    sums = MatMulInteger (x, w, half, half)
    y = Cast <to: int = 1> (sums)
"""
# Engines for GPUs multiply what DequantizeLinear says of rounded inputs and of weights [N, K] with a scale per row.
DEQUANTISED = """
    one = Constant <value: tensor = float {1}> ()
    zero = Constant <value: tensor = int8 {0}> ()
    rounded = QuantizeLinear (x, one, zero)
    rows = DequantizeLinear (rounded, one, zero)
    outputs = DequantizeLinear <axis: int = 0> (w, scales)
    columns = Transpose <perm: ints = [1, 0]> (outputs)
    y = MatMul (rows, columns)
"""


def codes() -> tuple[np.ndarray, np.ndarray]:
    """Rows [T, K] and weights [N, K] of int8 numbers, some where 16 bits saturate first."""
    rng = np.random.default_rng(3)
    x, w = (rng.integers(-127, 128, (n, FEATURES)) for n in (ROWS, OUTPUTS))
    x[0] = w[0] = 127
    return x, w


def run(kind: str, body: str, x: np.ndarray, constants: dict[str, np.ndarray], literal: bool) -> np.ndarray:
    model = parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 21]> g ({kind}[T, K] x) => (float[T, N] y) {{ {body} }}'
    )
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    session = ort.InferenceSession(model.SerializeToString(), session_options(1, literal))
    return session.run(None, {"x": x})[0]


def test_products_of_a_bundle_are_exact() -> None:
    x, w = codes()
    y = run("uint8", U8_BY_U8, (x + 128).astype(np.uint8), {"w": (w.T + 128).astype(np.uint8)}, literal=False)
    assert np.array_equal(y, x @ w.T)


def test_products_of_a_graph_for_gpus_are_exact() -> None:
    x, w = codes()
    constants = {"w": w.astype(np.int8), "scales": np.ones(OUTPUTS, np.float32)}
    y = run("float", DEQUANTISED, x.astype(np.float32), constants, literal=True)
    assert np.array_equal(y, x @ w.T)
