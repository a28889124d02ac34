"""A bundle of engines on the stand-ins, and what tests of its backend do with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arriero.export.proof.reference import TorchBackend
from arriero.runtimes.tensorrt import TensorRtBackend
from tests.tensorrt.fake_cuda import FakeCuda
from tests.tensorrt.fake_engine import FakeTensorRt

BATCH, CONTEXT, CHUNK = 3, 80, 16
PARTS = ("embed", "vision", "text")


@dataclass
class Bench:
    """A bundle of engines, the backend over it, the reference, and the stand-ins behind."""

    folder: Path
    reference: TorchBackend
    cuda: FakeCuda
    trt: FakeTensorRt
    product: Any

    def open(self) -> TensorRtBackend:
        return TensorRtBackend(self.folder, self.reference.spec, self.product)


def draw(rows: int, tokens: int, seed: int = 0):
    return np.random.default_rng(seed).integers(3, 150, (rows, tokens))


def step(backend, cache, ids, captures=False, wanted=None):
    embeds = backend.embed(ids, np.zeros((0, backend.spec.hidden_size), np.float32))
    positions = cache.lengths[:, None] + np.arange(ids.shape[1])
    index = np.arange(ids.shape[1]) if wanted is None else wanted
    return backend.forward(embeds, positions, cache, index, captures)


def equal(ours, theirs, rtol=1e-5):
    assert ours.dtype == theirs.dtype
    np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=rtol)
