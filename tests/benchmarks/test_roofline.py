"""The probe of the memory's bandwidth reads whatever it is given, wherever that lies."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest

from arriero.errors import MachineLacks

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def read_sum(tmp_path_factory):
    """The probe, as a function of an array."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        roofline = importlib.import_module("roofline")
    try:
        probe = roofline.build_probe(tmp_path_factory.mktemp("probe"))
    except MachineLacks as error:
        pytest.skip(f"needs a compiler: {error}")
    return lambda words: roofline.read_sum(probe, words)


@pytest.mark.parametrize("offset", range(8))
@pytest.mark.parametrize("count", [0, 5, 64, 200, 4096])
def test_the_bandwidth_probe_reads_buffers_that_are_not_aligned(read_sum, offset, count):
    room = np.empty(count + 24, np.uint64)
    start = -room.ctypes.data % 64 // 8 + offset
    words = room[start : start + count]
    words[:] = np.random.default_rng(0).integers(0, 1 << 63, count, np.uint64)
    assert words.ctypes.data % 64 == 8 * offset or not count
    assert read_sum(words) == int(words.sum(dtype=np.uint64))
