"""Integer products with AMX against the same products without: every bit.

Where the processor has no tiles, their instructions are emulated; where it has, `test_kernels.py` runs its level too.
"""

from __future__ import annotations

import ctypes
import json
import platform
import subprocess
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from arriero.export.compile import build_kernels
from arriero.export.compile.build_kernels import FLAGS, LEVELS, find_compiler
from arriero.profiles.grids import NORMAL_LEVELS
from arriero.runtimes.cpu import cpu_features
from tests import kernel_judge as judge
from tests.export.compile.conftest import cached
from tests.export.compile.test_kernels import GRIDS, INTEGERS, experts, stored_int
from tests.guarded_kernels import Guarded, assert_close, normal
from tests.shared import locked

EMULATOR = Path(__file__).parents[2] / "tile_emulator.cc"
compile_kernels = build_kernels.build_kernels  # what is compiled once for all tests is the product's
HAS_VNNI = "avx512_vnni" in cpu_features()
WITHOUT = "avx512vnni" if HAS_VNNI else "scalar"  # what has the same vectors beside its tiles
ROWS = (8, 15, 16, 17, 31, 32, 33, 70)

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86-64 machine")


@pytest.fixture(scope="module")
def library(request):
    """The product's kernels, but for the question whether the CPU has a level: it is answered yes.

    On a CPU without AVX-512 the tiles stand beside plain C++.
    """
    tiles = ["-mamx-tile", "-mamx-int8"]
    quick = {level: [*options, "-O0"] for level, options in LEVELS["x86_64"].items()}  # the same bits, sooner compiled
    levels = {"x86_64": quick | {"amx": LEVELS["x86_64"]["amx"] if HAS_VNNI else ["-march=x86-64", *tiles]}}
    flags = [*FLAGS, "-D__builtin_cpu_supports(feature)=true", "-Dsyscall=permit_tiles"]
    path = cached(request, "tiles", EMULATOR.read_bytes() + json.dumps([levels, flags]).encode())
    with locked(path):
        if not path.is_file():
            kernels = path.with_suffix(".o")
            with mock.patch.multiple(build_kernels, LEVELS=levels, FLAGS=flags):
                compile_kernels("x86_64", kernels)
            options = ["-std=c++17", "-O2", "-Wall", "-shared", "-fPIC", "-o", str(path)]
            subprocess.run([find_compiler("x86_64"), *options, str(kernels), str(EMULATOR)], check=True)
    assert ctypes.CDLL(str(path)).emulate_tiles() == 0
    return path


@pytest.fixture
def both(library):
    """Calls one function of the kernels with tiles and without, and gives both results."""

    def call(function, *arguments):
        kernels, results = Guarded(library, 3), []
        for level in ("amx", WITHOUT):
            if not kernels.use_level(level):
                pytest.skip("needs Linux 5.16 or newer, which lets a process use its processor's AMX")
            results.append(getattr(kernels, function)(*arguments))
        return results

    return call


@pytest.mark.parametrize(
    ("outputs", "features", "block"),
    [(5, 16, 16), (33, 96, 32), (40, 144, 48), (50, 240, 80), (48, 384, 128), (70, 512, 512), (100, 512, 256)],
)
@pytest.mark.parametrize("form", INTEGERS)
def test_products_have_the_same_bits_with_tiles(both, draw, form, outputs, features, block):
    weight, plain = stored_int(form, normal(draw, outputs, features), block)
    for rows in ROWS:
        x = normal(draw, rows, features)
        found, wanted = both("linear", x, weight, outputs)
        assert_array_equal(found, wanted)
    assert_close(found, *judge.rounded_linear(x, plain), error=1e-6)


@pytest.mark.parametrize("forms", [("int8", "int8"), ("int4_f16", "int8_f16"), ("grid4_f16", "grid3_f16")])
def test_experts_have_the_same_bits_with_tiles(both, draw, forms):
    """Rows of an expert do not lie together."""
    hidden, width, count = 96, 160, 4
    stored, _ = experts(draw, *forms, count, hidden, width, 32)
    for choices in (1, 2):
        expert_id = draw.integers(0, count, (150, choices))
        x, score = normal(draw, 150, hidden), draw.uniform(0.1, 1, expert_id.shape).astype(np.float32)
        assert_array_equal(*both("dispatch", x, expert_id, score, stored, width))


@pytest.mark.parametrize("code", [0, 255])
@pytest.mark.parametrize("form", INTEGERS)
def test_sums_of_tiles_are_exact_at_the_extremes(both, draw, form, code):
    """The lowest or the highest code everywhere, and the largest activations."""
    block, outputs, rows = 256, 48, 20
    like, _ = stored_int(form, normal(draw, outputs, block), block)
    weight = replace(like, data=np.full_like(like.data, code), scales=np.ones_like(like.scales))
    signs = np.where(np.arange(rows) % 2, 1, -1)[:, None].astype(np.float32)
    found, wanted = both("linear", signs * np.full((rows, block), 127, np.float32), weight, outputs)
    assert_array_equal(found, wanted)
    grid = GRIDS[form]
    lowest, highest = (grid.low, grid.high) if grid.name == "even" else np.array(NORMAL_LEVELS[grid.bits])[[0, -1]]
    assert_array_equal(found, signs * np.full((rows, outputs), 127 * block * (highest if code else lowest)))


def test_a_nan_stays_in_its_token(both, draw):
    x = normal(draw, 20, 64)
    x[3, 40] = np.nan
    found, wanted = both("linear", x, stored_int("int8", normal(draw, 20, 64), 32)[0], 20)
    assert_array_equal(found, wanted)
    assert np.isnan(found[3]).all()
    assert np.isfinite(np.delete(found, 3, 0)).all()
