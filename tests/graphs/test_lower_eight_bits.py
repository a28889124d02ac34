"""Whole graphs of one byte per weight, against the torch reference whose linear layers round as the scheme says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from arriero.errors import ArrieroError
from arriero.export.compile import Device
from arriero.export.compile.onnxruntime import compile_graphs
from arriero.graphs import model as reference_model
from arriero.graphs.lower.onnxruntime import lower
from arriero.graphs.lower.part import Lowering
from arriero.graphs.model import Llama4
from arriero.profiles.groups import is_layer_matrix
from arriero.profiles.quantized_weights import QuantizedWeights, RoundingRecord
from arriero.profiles.schemes import Exact, Fp8, Fp8Static, Int8Dynamic, Int8Static, Scheme, Static
from arriero.profiles.static_scales import fit_inputs
from tests.graphs.test_lower_onnxruntime import CUTS, Built, Stepper, relative, stepped, whole

SCHEMES: dict[str, Scheme] = {
    "fp8": Fp8(kind="fp8", activations="fp8"),
    "fp8 weights": Fp8(kind="fp8", activations="float32"),
    "dynamic": Int8Dynamic(kind="int8_dynamic"),
    "static": Int8Static(kind="int8_static"),
    "smooth": Int8Static(kind="int8_static", smooth=0.5),
    "rtn": Int8Static(kind="int8_static").rtn_baseline(),
}
# The first token, the same arithmetic in another order of summation: measured 1e-7 to 4e-7.
TOLERANCE = 5e-6
# Later on, an activation near the middle between two steps may go up here and down there, and what follows from it
# is rounded anew: measured 1e-7 to 0.25 of the error that rounding makes.
OTHER_WAY = 0.5
RANGE = 4.0  # what the made-up calibration saw of feature 0; feature j saw RANGE / (1 + j % 3)


@pytest.fixture(scope="module", params=["scout", "maverick", "top-2 and tied"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(tmp_path_factory.mktemp("lowered"), request.param)


def assign(built: Built, scheme: Scheme) -> dict[str, Scheme]:
    return {name: scheme if is_layer_matrix(name) else Exact() for name in built.checkpoint.tensors}


def seen(features: int) -> np.ndarray:
    return (RANGE / (1 + np.arange(features) % 3)).astype(np.float32)


def round_inputs(built: Built, scheme: Scheme, folder: Path) -> QuantizedWeights:
    roundings = QuantizedWeights(folder)
    assert isinstance(scheme, Static)
    for name in filter(is_layer_matrix, built.checkpoint.tensors):
        weight = built.checkpoint.read_float32(name)
        for number, matrix in enumerate(weight.swapaxes(1, 2) if weight.ndim == 3 else weight[None]):
            fitted = fit_inputs(seen(matrix.shape[1]), np.abs(matrix).max(0), scheme.smooth, name)
            expert = number if weight.ndim == 3 else None
            roundings.write(name, expert, len(weight), fitted, RoundingRecord(name, expert, "observed", 9, RANGE, None))
    return roundings


def emulated(scheme: Scheme, x: Tensor, weight: Tensor) -> Tensor:
    """x [T, K] times weight [N, K] as `scheme` rounds them, in float64 where it is exact in the kernels."""

    def float8(values: Tensor) -> Tensor:
        return values.clamp(-448, 448).to(torch.float8_e4m3fn).float()

    weight = weight.float()
    token = x.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    output = weight.abs().amax(-1, keepdim=True)
    if isinstance(scheme, Fp8):
        rows = float8(weight / (output / 448)) * (output / 448)
        return x @ rows.T if scheme.activations == "float32" else float8(x / (token / 448)) @ rows.T * (token / 448)
    if isinstance(scheme, Int8Dynamic):
        divisor, step = torch.ones(x.shape[-1]), token / 127
    else:
        assert isinstance(scheme, Static)
        divisor, largest = torch.ones(x.shape[-1]), torch.from_numpy(seen(x.shape[-1]))
        if scheme.smooth is not None:
            divisor = largest**scheme.smooth / weight.abs().amax(0) ** (1 - scheme.smooth)
        top = 448 if isinstance(scheme, Fp8Static) else 127
        step = (largest / divisor).max() / top if scheme.calibrates else weight.abs().max() / top
    balanced = weight * divisor
    if isinstance(scheme, Fp8Static):
        scales = balanced.abs().amax(-1, keepdim=True) / 448
        return float8(x / (divisor * step)) @ float8(balanced / scales).T * step * scales.T
    output = balanced.abs().amax(-1, keepdim=True) / 127
    integers = (x / divisor / step).round().clamp(-127, 127).double() @ (balanced / output).round().double().T
    return (integers * step * output.T).float()


@contextmanager
def rounding(model: Llama4, scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within the block the decoder layers' products are `emulated`, all others exact."""
    inside = {id(part) for name, part in model.named_modules() if is_layer_matrix(f"{name}.weight")}
    exact = reference_model.Linear.forward

    def linear(self: Any, x: Tensor) -> Tensor:
        if id(self) not in inside:
            return exact(self, x)
        return emulated(scheme, x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])

    def dispatch(x: Tensor, expert_id: Tensor, score: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for token, slot in np.ndindex(*expert_id.shape):
            expert = int(expert_id[token, slot])
            gate, up = emulated(scheme, x[None, token] * score[token, slot], gate_up[expert].mT).chunk(2, -1)
            y[token] += emulated(scheme, torch.nn.functional.silu(gate) * up, down[expert].mT)[0]
        return y

    with monkeypatch.context() as patch:
        patch.setattr(reference_model.Linear, "forward", linear)
        patch.setattr(reference_model, "expert_dispatch", dispatch)
        yield


@pytest.mark.parametrize("name", SCHEMES)
def test_prefill_and_decode_compute_what_the_scheme_says(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    scheme = SCHEMES[name]
    roundings = round_inputs(built, scheme, tmp_path / "roundings") if scheme.calibrates else None
    table = lower(
        "text",
        built.canonical,
        Lowering(built.config, built.checkpoint, assign(built, scheme), tmp_path, roundings=roundings),
    )
    compile_graphs(tmp_path, ["text"], Device())
    embeds = built.embeds(1)
    ours = stepped(Stepper(tmp_path / "text.onnx", built.config, 1), embeds.numpy(), CUTS)
    with rounding(built.reference, scheme, monkeypatch):
        want = whole(built.reference, embeds)
    exact = whole(built.reference, embeds)
    rounding_error = relative(ours["logits"], exact.logits)
    assert rounding_error > 1e-3  # or nothing was rounded
    assert relative(ours["logits"], want.logits) < OTHER_WAY * rounding_error
    first = relative(ours["logits"][:, :1], want.logits[:, :1])
    assert first < TOLERANCE
    assert {entry["scheme"] for entry in table.values()} == {"exact", scheme.label}
    for tensor, entry in table.items():
        if tensor.endswith(".packed"):
            assert entry["dtype"] == ("F8_E4M3" if isinstance(scheme, Fp8) else "U8")


def test_one_node_each_and_no_body_that_nobody_calls(built: Built, tmp_path: Path) -> None:
    lower(
        "text", built.canonical, Lowering(built.config, built.checkpoint, assign(built, SCHEMES["dynamic"]), tmp_path)
    )
    model = ir.load(tmp_path / "text.onnx")
    nodes = [node.op_type for node in model.graph if node.domain == "ai.arriero"]
    assert nodes.count("Int8DynamicExpertDispatch") == len(built.config.text.moe_layers)
    assert set(nodes) == {"Int8DynamicLinear", "Int8DynamicExpertDispatch", "RouteTokens"}
    assert {name for _, name, _ in model.functions} == set(nodes)


def mixed_schemes(built: Built, gate_up: Scheme, down: Scheme) -> dict[str, Scheme]:
    layer = built.config.text.moe_layers[0]
    prefix = f"language_model.model.layers.{layer}.feed_forward.experts"
    return {**assign(built, Exact()), f"{prefix}.gate_up_proj": gate_up, f"{prefix}.down_proj": down}


@pytest.mark.parametrize(
    ("gate_up", "down"), [("dynamic", "fp8"), ("fp8", "fp8 weights"), ("dynamic", None), (None, "dynamic")]
)
def test_half_a_layer_is_refused(built: Built, tmp_path: Path, gate_up: str | None, down: str | None) -> None:
    pick: Callable[[str | None], Scheme] = lambda name: SCHEMES[name] if name else Exact()  # noqa: E731
    with pytest.raises(ArrieroError, match="no single kernel takes"):
        lower(
            "text",
            built.canonical,
            Lowering(
                built.config,
                built.checkpoint,
                mixed_schemes(built, pick(gate_up), pick(down)),
                tmp_path,
            ),
        )


def test_a_range_that_calibration_did_not_leave_is_named(built: Built, tmp_path: Path) -> None:
    with pytest.raises(ArrieroError, match="calibration gave no rounding for this tensor"):
        lower(
            "text",
            built.canonical,
            Lowering(built.config, built.checkpoint, assign(built, SCHEMES["static"]), tmp_path),
        )
