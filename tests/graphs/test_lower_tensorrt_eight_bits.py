"""The profiles of eight bits with our kernels as plugins, given bodies of standard operators: equal to the tiles.

The kernels' layout is read back by the formula in their header.
"""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from arriero.graphs.lower.part import Lowering
from arriero.graphs.lower.tensorrt import lower
from arriero.graphs.rewrite.nodes import add_constant, insert_node
from arriero.graphs.stored.expert_plugins import INNER_SCALES
from arriero.profiles.recipe import load_profile
from arriero.profiles.schemes import Static
from tests.graphs.stored.test_mma_layout import read_back
from tests.graphs.test_lower_eight_bits import OTHER_WAY, round_inputs
from tests.graphs.test_lower_onnxruntime import CUTS, Built, relative, stepped, whole
from tests.graphs.test_lower_tensorrt import TOLERANCE, InPlace, built

__all__ = ["built"]

CODES = {"int8": np.int8, "fp8": ml_dtypes.float8_e4m3fn}
# Each row of codes times its expert's numbers, and the scale of each output.
PRODUCT = """
    last = Constant <value_ints: ints = [-1]> ()
    expert = Reshape (ids, last)
    codes = Cast <to: int = 1> (ROWS)
    column = Unsqueeze (codes, last)
    taken = Gather <axis: int = 0> (numbers, expert)
    products = MatMul (taken, column)
    sums = Squeeze (products, last)
    factors = Gather <axis: int = 0> (scales, expert)
    plain = Mul (sums, factors)
"""
# Rows of codes in float16, each a pair with one expert and score 1; numbers [E, out, in] as float32, scales [E, out].
GATE_UP = (
    """
<domain: "arriero", opset_import: ["" : 24]>
ExpertGateUp <plugin_namespace, form, aot> (x, ids, score, numbers, scales) => (y)
{
"""
    + PRODUCT.replace("ROWS", "x")
    + """
    both = Mul (plain, score)
    gate, up = Split <axis: int = -1, num_outputs: int = 2> (both)
    sigmoid = Sigmoid (gate)
    silu = Mul (gate, sigmoid)
    inner = Mul (silu, up)
    sixteenth = Constant <value_float: float = 0.0625> ()
    scaled = Mul (inner, sixteenth)
    y = Cast <to: int = 10> (scaled)
}
"""
)
DOWN = (
    """
<domain: "arriero", opset_import: ["" : 24]>
ExpertDown <plugin_namespace, form, aot> (inner, ids, numbers, scales) => (y)
{
    one = Constant <value_ints: ints = [1]> ()
"""
    + PRODUCT.replace("ROWS", "inner")
    + """
    choices = Shape (ids)
    shape = Concat <axis: int = 0> (choices, last)
    grouped = Reshape (plain, shape)
    summed = ReduceSum <keepdims: int = 0> (grouped, one)
    y = Cast <to: int = 10> (summed)
}
"""
)


@pytest.fixture(params=["gpu-int8", "gpu-fp8"])
def lowered(request: pytest.FixtureRequest, built: Built, tmp_path: Path) -> tuple[Path, Path]:
    """The folders of one profile's graph with plugins and of the one with tiles, on a made-up calibration."""
    schemes = load_profile(request.param).assign(built.checkpoint.tensors)
    (scheme,) = {scheme for scheme in schemes.values() if isinstance(scheme, Static)}
    roundings = round_inputs(built, scheme, tmp_path / "roundings")
    folders = {89: tmp_path / "plugins", 75: tmp_path / "tiles"}
    for capability, folder in folders.items():
        given = Lowering(built.config, built.checkpoint, schemes, folder, roundings=roundings, capability=capability)
        lower("text", built.canonical, given)
    return folders[89], folders[75]


def replace(value: ir.Value, array: np.ndarray) -> None:
    """Give an initialiser another array, of its own type."""
    value.const_value, value.dtype = ir.tensor(array, name=value.name), ir.DataType.from_numpy(array.dtype)
    value.shape = ir.Shape(array.shape)


def runnable(built: Built, folder: Path, idle: dict[int, np.ndarray] | None = None) -> InPlace:
    """The graph with plugins, their weights unpacked, NaN in all that belongs to `idle` experts: layer -> experts."""
    model = ir.load(folder / "text.onnx")
    for node in [node for node in model.graph if node.domain == "arriero"]:
        packed, scales = node.inputs[-2:]
        name = packed.name.removesuffix(".packed")
        experts, features, outputs = built.checkpoint.tensors[name].shape
        words = packed.const_value.numpy().reshape(experts * outputs, -1)
        codes = read_back(words, 8, features).view(CODES[node.attributes["form"].as_string()])
        numbers = codes.reshape(experts, outputs, features).astype(np.float32)
        factors, multipliers = scales.const_value.numpy().copy(), model.graph.initializers[f"{name}.multiplier"]
        own = multipliers.const_value.numpy().copy()
        if idle is not None:
            unused = idle[int(name.split("layers.")[1].split(".")[0])]
            for array in (numbers, factors, own):
                array[unused] = np.nan
        for value, array in ((packed, numbers), (scales, factors), (multipliers, own)):
            replace(value, array)
    for body in (GATE_UP, DOWN):
        function = ir.serde.deserialize_function(onnx.parser.parse_function(body))
        model.functions[function.identifier()] = function
    ir.save(model, folder / "run.onnx", external_data="run.data")
    return InPlace(folder / "run.onnx", built.config, 1)


def round_as_plugins(built: Built, folder: Path) -> InPlace:
    """The graph of tiles, in float16 where the kernels hand that on: Down's inputs before their codes, and results."""
    model = ir.load(folder / "text.onnx")
    steps = (
        ["Reshape", "Gather"]
        if built.config.text.experts_per_token == 1
        else ["Reshape", "Gather", "Reshape", "ReduceSum"]
    )
    count = 0
    for node in list(model.graph):
        own = node.inputs[1].producer() if node.op_type == "Mul" else None
        stored = own.inputs[0].producer() if own is not None and own.op_type == "Unsqueeze" else None
        name = stored.inputs[0].name if stored is not None and stored.op_type == "Gather" else ""
        if name.endswith("experts.down_proj.multiplier"):
            node.replace_input_with(0, halved(node, node.inputs[0], INNER_SCALES["F16"]))
        elif name.endswith("experts.down_proj.scales"):
            value = node.outputs[0]
            for step in steps:
                (user,) = value.consumers()
                assert user.op_type == step
                value = user.outputs[0]
            for user, index in list(value.uses()):
                user.replace_input_with(index, halved(user, value))
        else:
            continue
        count += 1
    assert count == 2 * len(built.config.text.moe_layers)
    ir.save(model, folder / "rounded.onnx")
    return InPlace(folder / "rounded.onnx", built.config, 1)


def halved(before: ir.Node, value: ir.Value, scale: float = 1.0) -> ir.Value:
    """`value` as float16 holds it, multiplied with `scale` meanwhile."""
    there, back = (add_constant(before, ir.tensor(np.array(factor, np.float32))) for factor in (scale, 1 / scale))
    narrow = insert_node(before, "Cast", [insert_node(before, "Mul", [value, there])], to=10)
    return insert_node(before, "Mul", [insert_node(before, "Cast", [narrow], to=1), back])


def test_plugins_equal_tiles(built: Built, lowered: tuple[Path, Path]) -> None:
    """In float32's order of summation where the tiles round as the kernels do; where they do not, within the error that
    rounding makes: an input near the middle between two codes goes the other way."""
    plugins, tiles = lowered
    embeds = built.embeds(1)
    ours = stepped(runnable(built, plugins), embeds.numpy(), CUTS)
    same = stepped(round_as_plugins(built, tiles), embeds.numpy(), CUTS)
    for name in ("logits", *(f"hidden.{index}" for index in range(len(built.config.text.layers)))):
        assert relative(ours[name], torch.from_numpy(same[name])) < TOLERANCE
    plain = stepped(InPlace(tiles / "text.onnx", built.config, 1), embeds.numpy(), CUTS)
    error = relative(plain["logits"], whole(built.reference, embeds).logits)
    assert error > 1e-3  # or nothing was rounded
    assert relative(ours["logits"], torch.from_numpy(plain["logits"])) < OTHER_WAY * error


def test_nothing_of_an_unrouted_expert_is_read(built: Built, lowered: tuple[Path, Path]) -> None:
    embeds = built.embeds(1)[:, :9].numpy()
    wanted = runnable(built, lowered[0]).step(embeds)
    layers, experts = built.config.text.moe_layers, np.arange(built.config.text.experts)
    if not layers:
        pytest.skip("needs a model with experts")
    idle = {layer: np.setdiff1d(experts, wanted[f"expert_id.{layer}"]) for layer in layers}
    assert any(len(unused) for unused in idle.values())
    poisoned = runnable(built, lowered[0], idle).step(embeds)
    assert np.array_equal(poisoned["logits"], wanted["logits"])
