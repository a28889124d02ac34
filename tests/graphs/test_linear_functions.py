"""The eight-bit linear layers and dispatches as ONNX Runtime runs their bodies, against numpy on the same bytes."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from arriero.graphs.dispatch_functions import dispatch_over
from arriero.graphs.functions import DOMAIN, add_functions
from arriero.graphs.linear_functions import LINEAR_FUNCTIONS

F8 = ml_dtypes.float8_e4m3fn
Arrays = Mapping[str, np.ndarray]
# The same arithmetic in another order of summation: measured 2e-7 to 4e-7.
TOLERANCE = 2e-6


def float8(x: np.ndarray) -> np.ndarray:
    return np.clip(x, -448, 448).astype(F8).astype(np.float32)


def per_token(x: np.ndarray, top: float) -> np.ndarray:
    return np.maximum(np.abs(x).max(-1, keepdims=True), np.float32(1e-30)) / np.float32(top)


def float8_linear(x: np.ndarray, w: Arrays) -> np.ndarray:
    scale = per_token(x, 448)
    return float8(x / scale) @ (w["w"].astype(np.float32) * w["w_scales"][:, None]).T * scale


def float8_weight_linear(x: np.ndarray, w: Arrays) -> np.ndarray:
    return x @ (w["w"].astype(np.float32) * w["w_scales"][:, None]).T


def int8_dynamic_linear(x: np.ndarray, w: Arrays) -> np.ndarray:
    scale = per_token(x, 127)
    return np.rint(x / scale) @ (w["w"].astype(np.float64) - 128) * scale * w["w_scales"]


def int8_static_linear(x: np.ndarray, w: Arrays) -> np.ndarray:
    integers = np.clip(np.rint(x * w["w_multiplier"]), -127, 127)
    return integers @ (w["w"].astype(np.float64) - 128) * w["w_scales"]


JUDGES: dict[str, Callable[[np.ndarray, Arrays], np.ndarray]] = {
    "Float8Linear": float8_linear,
    "Float8WeightLinear": float8_weight_linear,
    "Int8DynamicLinear": int8_dynamic_linear,
    "Int8StaticLinear": int8_static_linear,
}


def draw(name: str, rng: np.random.Generator, outputs: int, features: int, *experts: int) -> dict[str, np.ndarray]:
    """Weight operands of the linear function `name`, stacked over `experts`."""
    operands = {"w_scales": rng.uniform(0.5, 2, (*experts, outputs)).astype(np.float32) / features}
    if name.startswith("Float8"):
        operands["w"] = (rng.standard_normal((*experts, outputs, features)) * 100).astype(F8)
    else:
        operands["w"] = rng.integers(1, 256, (*experts, features, outputs), np.uint8)
    if "w_multiplier" in LINEAR_FUNCTIONS[name][0]:
        operands["w_multiplier"] = rng.uniform(20, 90, (*experts, features)).astype(np.float32)
    return operands


def save(op_type: str, signature: str, operands: Arrays, path: Path) -> None:
    names = re.findall(r"\] (\w+)", signature)
    text = f"""<ir_version: 10, opset_import: ["" : 23, "{DOMAIN}" : 1]>
        g ({signature}) => (float[T, N] y) {{ y = {DOMAIN}.{op_type} ({", ".join([*names, *operands])}) }}"""
    proto = onnx.parser.parse_model(text)
    for name, values in operands.items():
        kind = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
        proto.graph.initializer.append(onnx.helper.make_tensor(name, kind, values.shape, values.tobytes(), raw=True))
    model = ir.serde.deserialize_model(proto)
    add_functions(model)
    ir.save(model, path / "m.onnx", external_data="m.data")


def session(op_type: str, signature: str, operands: Arrays, path: Path) -> ort.InferenceSession:
    save(op_type, signature, operands, path)
    return load(path)


def load(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(path / "m.onnx", options)


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / (np.linalg.norm(wanted) or 1))


@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("name", JUDGES)
def test_a_linear_layer_is_its_formula(tmp_path: Path, name: str, tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    operands = {key: draw(name, rng, 24, 40)[key] for key in LINEAR_FUNCTIONS[name][0]}
    x = (rng.standard_normal((tokens, 40)) * 10.0 ** rng.uniform(-3, 3, (tokens, 1))).astype(np.float32)
    (y,) = session(name, "float[T, K] x", operands, tmp_path).run(None, {"x": x})
    wanted = JUDGES[name](x, operands)
    assert y.shape == wanted.shape
    assert all(error(one, other) < TOLERANCE for one, other in zip(y, wanted, strict=True))


@pytest.mark.parametrize("name", JUDGES)
def test_zeros_and_huge_tokens_give_numbers(tmp_path: Path, name: str) -> None:
    rng = np.random.default_rng(0)
    operands = {key: draw(name, rng, 24, 40)[key] for key in LINEAR_FUNCTIONS[name][0]}
    x = np.zeros((4, 40), np.float32)
    x[1, 3], x[2], x[3, 5] = 1e30, -1e20, 1e-38
    (y,) = session(name, "float[T, K] x", operands, tmp_path).run(None, {"x": x})
    assert np.isfinite(y).all()
    assert (y[0] == 0).all()
    np.testing.assert_allclose(y[1], JUDGES[name](x[1:2], operands)[0], rtol=1e-5)


@pytest.mark.parametrize("name", JUDGES)
@pytest.mark.parametrize("per_row", [1, 2])
def test_a_dispatch_multiplies_with_the_routed_experts_only(tmp_path: Path, name: str, per_row: int) -> None:
    rng = np.random.default_rng(per_row)
    hidden, width, experts, tokens = 40, 24, 5, 9
    drawn = {"gate_up": draw(name, rng, 2 * width, hidden, experts), "down": draw(name, rng, hidden, width, experts)}
    operands = {f"{matrix}_{key}": drawn[matrix][key] for matrix in drawn for key in LINEAR_FUNCTIONS[name][0]}
    for key, values in operands.items():  # expert 3 is routed to by nobody: what it holds must not matter
        if "scales" in key:
            values[3] = np.nan
    x = rng.standard_normal((tokens, hidden)).astype(np.float32)
    chosen = np.stack([rng.permutation([0, 1, 2, 4])[:per_row] for _ in range(tokens)]).astype(np.int64)
    score = rng.uniform(0.1, 0.9, (tokens, per_row)).astype(np.float32)
    wanted = np.zeros_like(x)
    for token in range(tokens):
        for slot, expert in enumerate(chosen[token]):
            gate_up, down = ({key: one[expert] for key, one in drawn[matrix].items()} for matrix in drawn)
            gate, up = np.split(JUDGES[name](x[token : token + 1] * score[token, slot], gate_up), 2, -1)
            inner = (gate / (1 + np.exp(-np.maximum(gate, -80))) * up).astype(np.float32)
            wanted[token] += JUDGES[name](inner, down)[0]
    signature = "float[T, H] x, int64[T, k] expert_id, float[T, k] score"
    feeds = {"x": x, "expert_id": chosen, "score": score}
    (y,) = session(dispatch_over(name), signature, operands, tmp_path).run(None, feeds)
    # An inner activation within 1e-6 of the middle between two steps may go either way.
    assert error(y, wanted) < 2e-3
    assert np.median(np.abs(y - wanted)) < 1e-5 * np.abs(wanted).max()


def test_fp8_weights_stay_one_byte_each_in_memory(tmp_path: Path) -> None:
    """A copy of the weights in float32 would take 128 MiB; nothing of the kind appears at load."""
    operands = draw("Float8Linear", np.random.default_rng(0), 4096, 8192)
    save("Float8Linear", "float[T, K] x", {key: operands[key] for key in ("w", "w_scales")}, tmp_path)
    del operands
    gc.collect()
    before = anonymous_bytes()
    made = load(tmp_path)
    assert anonymous_bytes() - before < 48 * 2**20
    assert made.run(None, {"x": np.ones((1, 8192), np.float32)})[0].shape == (1, 4096)


def anonymous_bytes() -> int:
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if "Rss" in line)
    return int(fields["RssAnon"].split()[0]) * 1024
