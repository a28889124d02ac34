"""The probe of the memory's bandwidth reads whatever it is given, wherever that lies."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest

from arriero.errors import MachineLacks

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def roofline():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        return importlib.import_module("roofline")


@pytest.fixture(scope="module")
def probe(roofline, tmp_path_factory):
    try:
        return roofline.build_probe(tmp_path_factory.mktemp("probe"))
    except MachineLacks as error:
        pytest.skip(f"needs a compiler: {error}")


@pytest.mark.parametrize("offset", range(8))
@pytest.mark.parametrize("count", [0, 5, 64, 200, 4096])
def test_the_bandwidth_probe_reads_buffers_that_are_not_aligned(roofline, probe, offset, count):
    room = np.empty(count + 24, np.uint64)
    start = -room.ctypes.data % 64 // 8 + offset
    words = room[start : start + count]
    words[:] = np.random.default_rng(0).integers(0, 1 << 63, count, np.uint64)
    assert words.ctypes.data % 64 == 8 * offset or not count
    assert roofline.read_sum(probe, words) == int(words.sum(dtype=np.uint64))


def test_every_reading_of_the_bandwidth_is_whole_whatever_the_threads(roofline, monkeypatch):
    seen = []
    monkeypatch.setattr(roofline, "read_sum", lambda probe, part: seen.append(part))
    words = np.arange(50 * roofline.LINE + 1, dtype=np.uint64)[1:]
    assert roofline.read_bandwidth(None, words, 3) > 0
    assert len(seen) == 3 * roofline.TRIES
    assert sorted(np.concatenate(seen).tolist()) == np.repeat(words, roofline.TRIES).tolist()
    assert all(len(part) % roofline.LINE == 0 for part in seen)


def test_the_rate_of_dots_counts_those_of_every_thread(roofline, probe, monkeypatch):
    monkeypatch.setattr(roofline, "DOTS", 1000)
    monkeypatch.setattr(roofline, "_least_seconds", lambda work, parts: [work(part) for part in parts] and 2.0)
    assert roofline.dot_rate(probe, 3) == 3 * probe.int8_dots(1000) / 2
