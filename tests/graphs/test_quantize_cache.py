"""Text graphs with an int8 cache against the torch reference whose keys and values are rounded by the test itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from arriero.graphs import model as reference_model
from arriero.graphs.lower.onnxruntime import lower
from arriero.graphs.lower.part import Lowering
from arriero.graphs.model import StepTensors
from arriero.profiles.kv_cache import CacheRange, CacheScales, StoredCache, cache_scales
from arriero.profiles.recipe import load_profile
from tests.graphs.test_lower_onnxruntime import CUTS, Built, Stepper, relative, stepped, whole

# Both sides round the same keys but for sums in another order, so that a value just between two codes may go to either.
# Measured 3.3e-7 to 3.8e-7, where none did. One such code among the toy's 13,000 would add about 3e-4: rounding them
# all adds 1e-2.
TOLERANCE = 1e-3


class Rounded:
    """A toy's lowering with an int8 cache, whose scales come from its own keys and values."""

    def __init__(self, folder: Path, name: str) -> None:
        self.built = Built(folder, name)
        text = self.built.config.text
        seen = [CacheRange(text.kv_heads, text.head_dim, layer.rope) for layer in text.layers]
        enough = whole(self.built.reference, self.built.embeds(21)).present  # 21 sequences of 50 tokens
        for layer, pair in zip(seen, enough, strict=True):
            layer.add(*(one.transpose(1, 2).flatten(0, 1).numpy() for one in pair))
        self.scales = cache_scales([layer.to_json() for layer in seen])
        self.folder = folder / "int8-cache"
        self.folder.mkdir()
        schemes = load_profile("fp32").assign(self.built.checkpoint.tensors)
        config, checkpoint = self.built.config, self.built.checkpoint
        lower(
            "text",
            self.built.canonical,
            Lowering(config, checkpoint, schemes, self.folder, cache=StoredCache("int8", self.scales)),
        )

    def embeds(self, seed: int) -> torch.Tensor:
        draw = torch.Generator().manual_seed(seed)
        return torch.randn(1, 50, self.built.config.text.hidden_size, generator=draw)

    def stepper(self, batch: int = 1) -> Stepper:
        return Stepper(self.folder / "text.onnx", self.built.config, batch)

    def expected(self, embeds: torch.Tensor) -> StepTensors:
        with rounding(self.scales):
            return whole(self.built.reference, embeds)


@contextmanager
def rounding(scales: list[CacheScales]) -> Iterator[None]:
    """Within the block, the reference's attention reads keys and values that were rounded by `scales`."""
    attend, calls = reference_model.cached_attention, iter(range(10**6))

    def rounded(x: torch.Tensor, steps: np.ndarray) -> torch.Tensor:
        step = torch.from_numpy(steps)
        return ((x.unflatten(-1, step.shape) / step).round().clamp(-128, 127) * step).flatten(-2)

    def attend_rounded(q: Any, k: Any, v: Any, *rest: Any) -> Any:
        layer = scales[next(calls) % len(scales)]
        return attend(q, rounded(k, layer.key), rounded(v, layer.value), *rest)

    reference_model.cached_attention = attend_rounded
    try:
        yield
    finally:
        reference_model.cached_attention = attend


@pytest.fixture(scope="module", params=["scout", "maverick"])
def toy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Rounded:
    return Rounded(tmp_path_factory.mktemp("rounded"), request.param)


def test_prefill_and_decode_over_chunks_compute_what_the_codes_stand_for(toy: Rounded) -> None:
    embeds = toy.embeds(99)
    ours = stepped(toy.stepper(), embeds.numpy(), CUTS)
    expected, exact = toy.expected(embeds), whole(toy.built.reference, embeds)
    assert relative(ours["logits"], expected.logits) < TOLERANCE
    assert relative(ours["logits"], exact.logits) > 3 * TOLERANCE  # so the rounding is there, and told apart
    for index, hidden in enumerate(expected.hiddens):
        assert relative(ours[f"hidden.{index}"], hidden) < TOLERANCE


def test_the_buffers_hold_the_nearest_codes(toy: Rounded) -> None:
    embeds, stepper = toy.embeds(98), toy.stepper()
    present = toy.expected(embeds).present
    stepped(stepper, embeds.numpy(), CUTS)
    for index, layer in enumerate(toy.built.config.text.layers):
        held = slice(48, 50) if layer.chunked else slice(0, 50)  # chunks of 16: the last one began at 48
        for kind, tensor in zip(("key", "value"), present[index], strict=True):
            codes = stepper.cache[f"{kind}.{index}"]
            assert codes.dtype == np.int8
            back = codes[:, :, : held.stop - held.start] * getattr(toy.scales[index], kind)[None, :, None]
            assert relative(back, tensor[:, :, held]) < TOLERANCE
            if layer.chunked:
                assert codes.shape[2] == 16


def test_rows_of_a_batch_decode_apart_at_different_lengths(toy: Rounded) -> None:
    rows, single, stepper = [toy.embeds(seed) for seed in (90, 91, 92)], toy.stepper(), toy.stepper(3)
    expected = [toy.expected(row).logits[0] for row in rows]
    starts = [3, 16, 31]
    for row, start in enumerate(starts):
        single.lengths[:] = 0
        for begin, end in pairwise(sorted({0, *(cut for cut in CUTS if cut < start), start})):
            single.step(rows[row][:, begin:end].numpy())
        for name, buffer in single.cache.items():
            stepper.cache[name][row] = buffer[0]
    stepper.lengths[:] = starts
    for turn in range(18):  # each row crosses a chunk boundary at another turn
        tokens = np.stack([rows[row][0, start + turn].numpy() for row, start in enumerate(starts)])[:, None]
        wanted = torch.stack([expected[row][start + turn] for row, start in enumerate(starts)])
        assert relative(stepper.step(tokens)["logits"][:, 0], wanted) < TOLERANCE


def test_each_node_carries_its_layers_scales(toy: Rounded) -> None:
    nodes = {node.outputs[1].name: node for node in ir.load(toy.folder / "text.onnx").graph if len(node.outputs) > 2}
    for index, scales in enumerate(toy.scales):
        node = nodes[f"present_key.{index}"]
        assert [node.attributes[name].as_string() for name in ("k_quant_type", "v_quant_type")] == ["PER_CHANNEL"] * 2
        assert node.attributes["kv_cache_bit_width"].as_int() == 8
        for value, steps in zip(node.inputs[12:14], (scales.key, scales.value), strict=True):
            tensor = ir.convenience.get_const_tensor(value)
            np.testing.assert_array_equal(tensor.numpy(), steps[None, :, None])
