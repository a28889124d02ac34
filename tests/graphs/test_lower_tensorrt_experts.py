"""The forms of the expert dispatch that only a GPU has, given bodies of standard operators and run by ONNX Runtime.

The bodies say what TensorRT's documentation and our kernels' header say of the nodes; that a GPU agrees is not shown.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from arriero.graphs.lower.part import Lowering
from arriero.graphs.lower.tensorrt import lower
from arriero.graphs.stored.mma_layout import pack_int4_lanes
from arriero.profiles.quantize import Quantized, quantize
from arriero.profiles.schemes import Exact, Half, Int8Static, IntBlock, Scheme
from tests.graphs.test_lower_onnxruntime import CUTS, TOYS, Built, relative, stepped, whole
from tests.graphs.test_lower_tensorrt import HALF, HALF_TOLERANCE, INT4, InPlace, assign, same_routes

__all__ = ["built"]

INT8 = Int8Static(kind="int8_static").rtn_baseline()

# The node weights what an expert gives by its score; weights are [E, in, out], gate and up apart.
NATIVE = """
<domain: "trt", opset_import: ["" : 24]>
TRT_MoE <activation_type> (x, ids, scores, gate, up, down) => (y)
{
    flat = Constant <value_ints: ints = [-1]> ()
    expert = Reshape (ids, flat)
    rows = Transpose <perm: ints = [1, 0, 2]> (x)
    one_gate = Gather <axis: int = 0> (gate, expert)
    one_up = Gather <axis: int = 0> (up, expert)
    one_down = Gather <axis: int = 0> (down, expert)
    gated = MatMul (rows, one_gate)
    upped = MatMul (rows, one_up)
    sigmoid = Sigmoid (gated)
    silu = Mul (gated, sigmoid)
    inner = Mul (silu, upped)
    outer = MatMul (inner, one_down)
    turned = Transpose <perm: ints = [1, 0, 2]> (outer)
    y = Mul (turned, scores)
}
"""
# The score scales the expert's input; weights are [E, out, in], gate and up one after the other.
GATE_UP = """
<domain: "arriero", opset_import: ["" : 24]>
ExpertGateUp <plugin_namespace, form, aot> (x, ids, score, w, scales) => (y)
{
    flat = Constant <value_ints: ints = [-1]> ()
    one = Constant <value_ints: ints = [1]> ()
    two = Constant <value_ints: ints = [2]> ()
    expert = Reshape (ids, flat)
    rows = Unsqueeze (x, one)
    score_column = Unsqueeze (score, two)
    column = CastLike (score_column, x)
    scaled = Mul (rows, column)
    shape = Constant <value_ints: ints = [-1, 1, 64]> ()
    pairs = Reshape (scaled, shape)
    taken = Gather <axis: int = 0> (w, expert)
    turned = Transpose <perm: ints = [0, 2, 1]> (taken)
    both = MatMul (pairs, turned)
    gate, up = Split <axis: int = -1, num_outputs: int = 2> (both)
    sigmoid = Sigmoid (gate)
    silu = Mul (gate, sigmoid)
    inner = Mul (silu, up)
    full = Squeeze (inner, one)
    scale = Constant <value_float: float = 0.0625> ()
    narrow_scale = CastLike (scale, x)
    y = Mul (full, narrow_scale)
}
"""
DOWN = """
<domain: "arriero", opset_import: ["" : 24]>
ExpertDown <plugin_namespace, form, aot> (inner, ids, w, scales) => (y)
{
    flat = Constant <value_ints: ints = [-1]> ()
    one = Constant <value_ints: ints = [1]> ()
    hidden = Constant <value_ints: ints = [64]> ()
    expert = Reshape (ids, flat)
    rows = Unsqueeze (inner, one)
    taken = Gather <axis: int = 0> (w, expert)
    turned = Transpose <perm: ints = [0, 2, 1]> (taken)
    outer = MatMul (rows, turned)
    choices = Shape (ids)
    shape = Concat <axis: int = 0> (choices, hidden)
    grouped = Reshape (outer, shape)
    summed = ReduceSum <keepdims: int = 0> (grouped, one)
    scale = Constant <value_float: float = 16.0> ()
    narrow_scale = CastLike (scale, inner)
    y = Mul (summed, narrow_scale)
}
"""


def lowered(built: Built, schemes: dict[str, Scheme], out: Path, capability: int) -> Counter[str]:
    lower("text", built.canonical, Lowering(built.config, built.checkpoint, schemes, out, capability=capability))
    return Counter(node.op_type for node in ir.load(out / "text.onnx").graph)


@pytest.fixture(scope="session", params=[name for name in TOYS if name != "guard"])  # which has no experts
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(tmp_path_factory.mktemp("lowered"), request.param)


@pytest.mark.parametrize(
    ("capability", "nodes", "bodies"),
    [(110, {"TRT_MoE": 1}, [NATIVE]), (89, {"ExpertGateUp": 1, "ExpertDown": 1}, [GATE_UP, DOWN]), (75, {}, [])],
    ids=["native", "plugins", "tiles"],
)
def test_each_form_computes_llama_4s_dispatch(
    built: Built, tmp_path: Path, capability: int, nodes: dict[str, int], bodies: list[str]
) -> None:
    found = lowered(built, assign(built, HALF, HALF), tmp_path, capability)
    layers = len(built.config.text.moe_layers)
    assert {name: found[name] for name in ("TRT_MoE", "ExpertGateUp", "ExpertDown") if found[name]} == {
        name: count * layers for name, count in nodes.items()
    }
    model = ir.load(tmp_path / "text.onnx")
    for body in bodies:
        function = ir.serde.deserialize_function(onnx.parser.parse_function(body))
        model.functions[function.identifier()] = function
    ir.save(model, tmp_path / "text.onnx")
    embeds = built.embeds(1)
    ours = stepped(InPlace(tmp_path / "text.onnx", built.config, 1), embeds.numpy(), CUTS)
    expected = whole(built.reference, embeds)
    same = same_routes(built, ours, expected.expert_ids)
    assert same.mean() > 0.9
    assert relative(ours["logits"][0, same], expected.logits[0][same]) < HALF_TOLERANCE


@pytest.mark.parametrize("capability", [110, 89])
@pytest.mark.parametrize(
    ("scheme", "rest"),
    [(INT8, None), (INT8, Half(kind="half", format="bfloat16")), (INT4, None), (Exact(), None)],
    ids=["int8 beside fp32", "int8 beside bf16", "int4 beside fp32", "fp32"],
)
def test_what_a_form_does_not_know_is_computed_in_tiles(
    built: Built, tmp_path: Path, scheme: Scheme, rest: Scheme | None, capability: int
) -> None:
    found = lowered(built, assign(built, scheme, rest), tmp_path, capability)
    assert not {"TRT_MoE", "ExpertGateUp", "ExpertDispatch"} & set(found)
    assert found["ScatterElements"] == len(built.config.text.moe_layers)


@pytest.mark.parametrize("scheme", [INT8, INT4], ids=["int8", "int4"])
@pytest.mark.parametrize("capability", [75, 80, 110])
def test_every_gpu_but_turing_has_the_plugins(built: Built, tmp_path: Path, scheme: Scheme, capability: int) -> None:
    found = lowered(built, assign(built, scheme, HALF), tmp_path, capability)
    assert found["ExpertGateUp"] == found["ExpertDown"] == (capability > 75) * len(built.config.text.moe_layers)
    assert not {"TRT_MoE", "ExpertDispatch"} & set(found)


@pytest.mark.parametrize("order", [1, -1])
def test_a_layers_two_matrices_may_have_different_forms(built: Built, tmp_path: Path, order: int) -> None:
    """Codes are made for the one in eight bits alone."""
    schemes = assign(built, HALF, HALF)
    pair = dict(zip(("gate_up_proj", "down_proj"), [INT8, INT4][::order], strict=True))
    lowered(built, {name: pair.get(name.split(".")[-1], scheme) for name, scheme in schemes.items()}, tmp_path, 89)
    nodes = [node for node in ir.load(tmp_path / "text.onnx").graph if node.domain == "arriero"]
    forms = [node.attributes["form"].as_string() for node in nodes]
    assert forms == ["int8", "int4"][::order] * len(built.config.text.moe_layers)
    for node, form in zip(nodes, forms, strict=True):
        assert (node.inputs[0].producer().op_type == "DequantizeLinear") == (form == "int8")


def test_int4_goes_to_the_plugins_in_their_own_layout(built: Built, tmp_path: Path) -> None:
    found = lowered(built, assign(built, INT4, HALF), tmp_path, 87)
    assert found["ExpertGateUp"] == found["ExpertDown"] == len(built.config.text.moe_layers)
    model = ir.load(tmp_path / "text.onnx")
    node = next(node for node in model.graph if node.op_type == "ExpertDown")
    assert {name: attribute.value for name, attribute in node.attributes.items()} == {
        "plugin_namespace": "arriero",
        "form": "int4",
        "aot": 1,
    }
    packed, scales = (node.inputs[at].const_value.numpy() for at in (2, 3))
    name = str(node.inputs[2].name).removesuffix(".packed")
    stack = built.checkpoint.read_float32(name)
    wanted: Quantized = quantize(np.ascontiguousarray(stack.swapaxes(1, 2)), bits=4, block=32, name=name)
    assert np.array_equal(packed, pack_int4_lanes(wanted))
    assert np.array_equal(scales, wanted.scales)


def test_a_block_that_the_kernels_do_not_read_is_computed_in_tiles(built: Built, tmp_path: Path) -> None:
    fine = IntBlock(kind="int_block", bits=4, block=16, accuracy_level=0)
    assert not lowered(built, assign(built, fine, HALF), tmp_path, 87)["ExpertGateUp"]
