"""The graph after each phase, kept; and nodes that a lowering left, named with the reason."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from arriero.errors import ArrieroError
from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.config import ModelConfig
from arriero.graphs.functions import CACHED_ATTENTION, EXPERT_DISPATCH
from arriero.graphs.lower import onnxruntime as lowering
from arriero.graphs.lower.dump import GraphDump
from arriero.graphs.lower.part import Lowering
from arriero.graphs.trace import trace_text
from arriero.profiles.recipe import load_profile
from tests.toys import make_scout_toy


class Traced:
    """A toy's canonical text graph, and its lowering for ONNX Runtime."""

    def __init__(self, folder: Path) -> None:
        toy = make_scout_toy(folder / "toy", 1, vision=False)
        self.config, self.checkpoint = ModelConfig.load(toy), Checkpoint.open(toy)
        self.model, self.folder = trace_text(self.config, self.checkpoint, folder / "text.onnx"), folder

    def lower(self, dump: GraphDump | None = None) -> None:
        schemes = load_profile("fp32").assign(self.checkpoint.tensors)
        out = self.folder / "out"
        out.mkdir()
        lowering.lower("text", self.model, Lowering(self.config, self.checkpoint, schemes, out, dump=dump))


@pytest.fixture
def traced(tmp_path: Path) -> Traced:
    return Traced(tmp_path)


def test_each_phase_leaves_its_graph(traced: Traced, tmp_path: Path) -> None:
    traced.lower(GraphDump(tmp_path / "dump"))
    files = sorted(path.name for path in (tmp_path / "dump").iterdir())
    assert files == [
        "text.00-canonical.onnx",
        "text.01-fuse_rotary.onnx",
        "text.02-replace_attention_with_gqa.onnx",
        "text.03-add_forced_routing.onnx",
        "text.04-quantize_dispatch.onnx",
        "text.05-replace_dispatch_with_moe.onnx",
        "text.06-replace_linear.onnx",
        "text.07-add_functions.onnx",
        "text.08-lowered.onnx",
    ]
    counts = []
    for name in files:
        graph = onnx.load(tmp_path / "dump" / name, load_external_data=False).graph
        kinds = [node.op_type for node in graph.node]
        counts.append((kinds.count(CACHED_ATTENTION), kinds.count(EXPERT_DISPATCH)))
    assert counts == [(4, 4), (4, 4), (0, 4), (0, 4), (0, 4), (0, 0), (0, 0), (0, 0), (0, 0)]


def test_a_node_that_is_left_is_named_with_the_reason(traced: Traced) -> None:
    """One rotation of the first layer reads another angle than its pair: a pattern that nobody has thought of."""
    products = [node for node in traced.model.graph if node.op_type == "Sub"]
    odd = products[0].inputs[1]
    assert odd is not None
    product = odd.producer()
    assert product is not None
    product.replace_input_with(1, products[0].inputs[0].producer().inputs[1])
    with pytest.raises(
        ArrieroError, match=r"5 of 6 nodes RotaryEmbedding were lowered \(\S+: its products are not"
    ) as told:
        traced.lower()
    assert "--dump-graphs" in str(told.value)


def test_a_kind_that_vanished_is_said_to_be_gone(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "quantize_dispatch", lambda model, store: -1)
    with pytest.raises(ArrieroError, match=r"3 of 4 nodes ExpertDispatch were lowered \(no such node is left"):
        traced.lower()


def test_a_dump_needs_no_weights(traced: Traced, tmp_path: Path) -> None:
    traced.lower(GraphDump(tmp_path / "dump"))
    for path in (tmp_path / "dump").iterdir():
        assert path.stat().st_size < 400_000
        assert len(ir.load(path).graph.initializers) > 20
