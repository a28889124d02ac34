"""The CUDA kernels of eight-bit codes: what reaches the products, and how their sums are kept."""

from __future__ import annotations

import ctypes
import importlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from arriero.export.compile.cuda.launch import SHAPES, Kernel
from arriero.graphs.stored.mma_layout import pack_byte_lanes
from arriero.profiles.float8 import to_bits
from tests.cuda_emulator import EmulatedGpu, build, build_altered, cached_library
from tests.dispatch_cases import FLOAT8, Case, Matrices, draw_case

EXPERTS, HIDDEN, FFN = 3, 32, 2048
TOKENS = """
#include <forms.h>
using namespace arriero;
extern "C" void int8(const Quad* x, u32 (*b)[2], int n) { for (int i = 0; i < n; ++i) Int8::tokens(x[i], b[i]); }
extern "C" void fp8(const Quad* x, u32 (*b)[2], int n) { for (int i = 0; i < n; ++i) Fp8::tokens(x[i], b[i]); }
"""
# In the emulation: of each sum of E4M3 products 13 bits of fraction are kept, and the rest is cut off.
COARSE = (
    "sums[i] += sum;",
    "u32 bits; sums[i] += sum; memcpy(&bits, sums + i, 4); bits &= ~0x3ffu; memcpy(sums + i, &bits, 4);",
)


def positive_case(form: str, choices: int, numbers: np.ndarray, inner: np.ndarray) -> Case:
    """A case whose Down multiplies nothing but `numbers`, positive, with the codes `inner`."""
    expert_id = np.stack([(np.arange(9) + choice) % EXPERTS for choice in range(choices)], -1)
    case = draw_case(expert_id, form, "f16", hidden=HIDDEN, ffn=FFN, experts=EXPERTS)
    down = Matrices(pack_byte_lanes(numbers.view(np.uint8)), case.down.scales, numbers)
    return replace(case, inner=inner.astype(np.float16), down=down)


def test_every_code_reaches_the_products(tmp_path):
    """Whole numbers from -127 to 127, E4M3 values and, rounded to these, all finite float16 numbers."""
    build(tmp_path / "tokens.so", source=TOKENS)
    library = ctypes.CDLL(str(tmp_path / "tokens.so"))

    def narrowed(form: str, values: np.ndarray) -> np.ndarray:
        given = np.resize(values.astype(np.float16), -(-values.size // 8) * 8)
        found = np.empty(given.size, np.uint8)
        library[form](ctypes.c_void_p(given.ctypes.data), ctypes.c_void_p(found.ctypes.data), given.size // 8)
        return found[: values.size]

    whole = np.arange(-127, 128)
    np.testing.assert_array_equal(narrowed("int8", whole).view(np.int8), whole)
    codes = np.arange(256, dtype=np.uint8)
    codes = codes[np.isfinite(codes.view(FLOAT8).astype(np.float32))]
    np.testing.assert_array_equal(narrowed("fp8", codes.view(FLOAT8)), codes)
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)]
    np.testing.assert_array_equal(narrowed("fp8", halves), to_bits(halves.astype(np.float32)))


@pytest.mark.parametrize("choices", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_sums_are_exact(request, shape, choices):
    """Beyond where float32 holds every whole number: only the sum is rounded, and the sum times its scale."""
    draw = np.random.default_rng(0)
    numbers = draw.integers(64, 128, (EXPERTS, HIDDEN, FFN)).astype(np.int8)
    inner = draw.integers(64, 128, (9 * choices, FFN))
    case, gpu = positive_case("int8", choices, numbers, inner), EmulatedGpu(cached_library(request.config))
    exact = gpu.launch(Kernel("down", shape, "f16", "int8"), case.arrays("down"), case.sizes, case.result("down"))
    expected = np.zeros(case.x.shape, np.float32)
    for row, expert in enumerate(case.experts()):
        sums = numbers[expert].astype(np.int64) @ inner[row]
        assert (sums > 2**24).all()
        assert (sums.astype(np.float32) != sums).any()
        expected[row // choices] += sums.astype(np.float32) * case.down.scales[expert]
    np.testing.assert_array_equal(exact, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_float8_sums_bear_tensor_cores_of_few_bits(tmp_path, shape):
    """As all terms are positive, what is cut off adds up: of each product half a unit of the sum so far, on average.
    Sums over a whole row, or a warp's share of it, would be off by several units."""
    draw, kernel = np.random.default_rng(0), Kernel("down", shape, "f16", "fp8")
    numbers = draw.uniform(1, 2, (EXPERTS, HIDDEN, FFN)).astype(FLOAT8)
    case = positive_case("fp8", 1, numbers, draw.uniform(1, 2, (9, FFN)).astype(FLOAT8))
    expected, errors = case.expected("down"), []
    for name, changes in {"ours": {}, "whole rows": {"forms.h": ("int SPAN = 4;", "int SPAN = 0;")}}.items():
        gpu = EmulatedGpu(build_altered(tmp_path / name, kernel, {"ptx.h": COARSE, **changes}))
        exact = gpu.launch(kernel, case.arrays("down"), case.sizes, case.result("down"))
        errors.append(np.abs(exact / expected - 1).max())
    assert errors[0] < 2.0**-13
    assert errors[1] > (2.0**-12 if shape == "prefill" else 2.0**-13)  # decode's eight warps share a row out


@pytest.mark.parametrize("shape", SHAPES)
def test_the_check_on_a_gpu_allows_for_such_sums(tmp_path, monkeypatch, shape):
    """As on Ada: its own long rows, and terms that are all positive; not for sums over whole rows."""
    monkeypatch.syspath_prepend(Path(__file__).parents[3] / "benchmarks")
    check = importlib.import_module("gpu_check")
    ids = np.array([[0], [1], [-1], [1]])
    draw, worst = np.random.default_rng(0), check.allowance("f16", "fp8")

    def right(case: Case, op: str, changes: dict[str, tuple[str, str]]) -> bool:
        kernel, result = Kernel(op, shape, "f16", "fp8"), case.result(op)
        result.view(np.uint16)[...] = check.POISON
        gpu = EmulatedGpu(build_altered(tmp_path / f"{op}-{len(changes)}", kernel, {"ptx.h": COARSE, **changes}))
        gpu.launch(kernel, case.arrays(op), case.sizes, result)
        return check.judge(result, case.expected(op), worst)["right"]

    for op, (hidden, ffn) in {"gate_up": (2048, 16), "down": (16, 2048)}.items():
        assert right(draw_case(ids, "fp8", "f16", hidden=hidden, ffn=ffn, experts=2), op, {})
    numbers = draw.uniform(1, 2, (EXPERTS, HIDDEN, FFN)).astype(FLOAT8)
    positive = positive_case("fp8", 1, numbers, draw.uniform(1, 2, (9, FFN)).astype(FLOAT8))
    assert right(positive, "down", {})
    if shape == "prefill":  # a decode kernel's warps have an eighth of a row each
        assert not right(positive, "down", {"forms.h": ("int SPAN = 4;", "int SPAN = 0;")})
