"""Scout's constants at positions up to 10,485,759: PyTorch and both CPU backends against a decoder in float64.

Beyond the first chunks all layers are chunked here, NoPE ones too, for a global layer would need its millions of keys:
`tests/long/positions.py` does that at 1,000,000.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from arriero.graphs.config import ModelConfig
from arriero.graphs.rotary import inverse_frequencies, rotation_table
from tests.long_rows import CHUNKED, LAST, SCOUT, WINDOW, Window, error, native_kernels, open_backend
from tests.toys import load_reference, make_scout_toy

pytestmark = pytest.mark.usefixtures("one_thread")
# Relative to the largest value, float32 against float64: measured up to 6.7e-7. With float32 angles the last window's
# keys are off by 0.24 and its logits by 2e-3, the first one's by 1.5e-4 and 9e-6.
TOLERANCE = 4e-6
# Model and first position of its window. The first holds 8,191 and 8,192, on both sides of an edge.
CASES = {
    "8,191 and 8,192, global": (SCOUT, 8_188),
    "8,191 and 8,192": (CHUNKED, 8_188),
    "1,000,000": (CHUNKED, 999_996),
    "10,485,759": (CHUNKED, LAST - WINDOW + 1),
}


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("positions")
    return {
        name: make_scout_toy(folder / name, 7, vision=False, **text)
        for name, text in (("global", SCOUT), ("chunked", CHUNKED))
    }


@pytest.fixture(scope="module", params=CASES)
def window(request: pytest.FixtureRequest, toys: dict[str, Path]) -> tuple[str, Window]:
    text, start = CASES[request.param]
    name = "chunked" if text is CHUNKED else "global"
    return name, Window(toys[name], start)


@pytest.fixture(scope="module", params=["onnxruntime", "tvm"])
def backends(request: pytest.FixtureRequest, toys: dict[str, Path], tmp_path_factory: pytest.TempPathFactory):
    """The two toys, built for one backend."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "tvm":
        pytest.importorskip("tvm", reason="needs apache-tvm: pip install 'arriero[tvm]'")
        native_kernels(folder / "kernels.o")
    return {name: open_backend(request.param, toy, folder / name, folder / "kernels.o") for name, toy in toys.items()}


def test_a_backend_equals_float64_at_long_positions(backends, window):
    name, case = window
    assert max(case.run(backends[name])) <= TOLERANCE


@torch.no_grad()
def test_the_reference_equals_float64_at_long_positions(window, toys):
    name, case = window
    model = load_reference(toys[name]).language_model
    past = [tuple(torch.from_numpy(each.swapaxes(0, 1)[None].copy()) for each in layer[:2]) for layer in case.pasts]
    kinds = {layer.chunked: places for layer, (_, _, places) in zip(case.config.text.layers, case.pasts, strict=True)}
    chunk_places = torch.from_numpy(kinds[True])[None]
    global_places = torch.from_numpy(kinds.get(False, np.zeros(0, np.int64)))[None]
    positions, index = torch.from_numpy(case.positions)[None], torch.arange(WINDOW)
    step = model(torch.from_numpy(case.embeds)[None], positions, chunk_places, global_places, index, past)
    assert error(step.logits[0].numpy(), case.logits) <= TOLERANCE
    for (present, _), keys in zip(step.present, case.keys, strict=True):
        assert error(present[0, :, -WINDOW:].numpy(), keys.swapaxes(0, 1)) <= TOLERANCE


def test_angles_are_exact_where_float32_ones_are_half_a_radian_off(toys):
    text = ModelConfig.load(toys["global"]).text
    positions = torch.cat([torch.arange(600), torch.randint(LAST, (3000,)), torch.tensor([8191, 8192, 10**6, LAST])])
    cos, sin = rotation_table(positions[None], text)
    frequencies = inverse_frequencies(text.rope, text.head_dim)
    exact = positions[:, None].double() * frequencies
    assert max((cos[0] - exact.cos()).abs().max(), (sin[0] - exact.sin()).abs().max()) < 3e-7
    rounded = positions[:, None].float() * frequencies.float()
    assert (rounded.double() - exact).abs().max() > 0.4
