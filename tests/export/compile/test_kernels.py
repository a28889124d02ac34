"""The C++ kernels against float64 numpy, at every instruction-set level that this machine has or can emulate."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from arriero.errors import ArrieroError, MachineLacks
from arriero.export.compile.build_kernels import build_kernels, check_compiler, find_compiler
from arriero.export.compile.relax.kernels import FEW_OUTPUTS
from arriero.graphs.stored.packed_panels import (
    pack_e4m3_panels,
    pack_gate_up_e4m3_panels,
    pack_gate_up_panels,
    pack_panels,
)
from arriero.profiles.grids import NORMAL_LEVELS, Grid
from arriero.profiles.quantize import dequantize, pack, quantize
from tests import kernel_judge as judge
from tests.call_kernels import Kernels, Weight, pack_experts
from tests.guarded_kernels import SUM_ERROR, Guarded, assert_close, normal

HERE = platform.machine()
SMALL = ["grid3_f16", "grid2_f16"]
INTEGERS = ["int8", "int4", "int8_f16", "int4_f16", "grid4_f16", *SMALL]  # with scales in float32, and in float16
GRIDS = {form: Grid(int(form[4]), "normal") if form.startswith("grid") else Grid(int(form[3])) for form in INTEGERS}
EXACT = {"f32": np.float32, "bf16": ml_dtypes.bfloat16, "f16": np.float16}


@pytest.fixture
def kernels(kernels_at_level):
    return kernels_at_level


def stored_int(form, weight, block, gate_up=False):
    """Quantised `weight` [..., N, K]: what the kernel reads, and what numpy computes with."""
    grid = GRIDS[form]
    plain = quantize(weight, bits=grid.bits, block=block, name="w", grid=grid.name)
    panels = pack_gate_up_panels(plain) if gate_up else pack_panels(plain)
    scales = panels.scales.astype(np.float16) if form.endswith("f16") else panels.scales
    return Weight(form, panels.packed, scales, block), plain


def stored_e4m3(weight, gate_up=False):
    scales = (np.abs(weight).max(-1) / 448).astype(np.float32)
    codes = (weight / scales[..., None]).astype(ml_dtypes.float8_e4m3fn)
    packed = (pack_gate_up_e4m3_panels if gate_up else pack_e4m3_panels)(codes.view(np.uint8), scales)
    return Weight("e4m3", *packed), codes.astype(np.float64) * scales[..., None]


@pytest.mark.parametrize("tokens", [0, 1, 3, 17])
@pytest.mark.parametrize(("outputs", "features"), [(1, 5), (200, 600), (330, 600)])
@pytest.mark.parametrize("form", EXACT)
def test_exact_linear(kernels, draw, form, tokens, outputs, features):
    x, weight = normal(draw, tokens, features), normal(draw, outputs, features).astype(EXACT[form])
    wide = weight.astype(np.float64)
    assert_close(kernels.linear(x, Weight(form, weight), outputs), x @ wide.T, np.abs(x) @ np.abs(wide).T)


@pytest.mark.parametrize("tokens", [0, 1, 3, 17])
@pytest.mark.parametrize(("outputs", "features"), [(5, 7), (200, 600)])
def test_e4m3_linear(kernels, draw, tokens, outputs, features):
    x = normal(draw, tokens, features)
    weight, wide = stored_e4m3(normal(draw, outputs, features))
    assert_close(kernels.linear(x, weight, outputs), x @ wide.T, np.abs(x) @ np.abs(wide).T)


def test_every_e4m3_code_is_widened_exactly(kernels):
    codes = np.array([code for code in range(256) if code & 127 != 127], np.uint8)[:, None]
    weight = Weight("e4m3", *pack_e4m3_panels(codes, np.ones(len(codes), np.float32)))
    for tokens in (1, 5):
        found = kernels.linear(np.ones((tokens, 1), np.float32), weight, len(codes))
        assert_array_equal(found[-1], codes[:, 0].view(ml_dtypes.float8_e4m3fn).astype(np.float32))


@pytest.mark.parametrize("tokens", [0, 1, 3, 17])
@pytest.mark.parametrize(("outputs", "features", "block"), [(5, 16, 16), (33, 96, 32), (70, 512, 512), (100, 512, 256)])
@pytest.mark.parametrize("form", INTEGERS)
def test_int_linear(kernels, draw, form, tokens, outputs, features, block):
    x = normal(draw, tokens, features)
    weight, plain = stored_int(form, normal(draw, outputs, features), block)
    found = kernels.linear(x, weight, outputs)
    assert_close(found, *judge.rounded_linear(x, plain), error=1e-6)
    # and the rounding is as small as int8 activations are: half a step of each block's largest, added in quadrature
    exact = x @ dequantize(plain).astype(np.float64).T
    assert np.linalg.norm(found - exact) <= 0.02 * np.linalg.norm(exact)


@pytest.mark.parametrize("tokens", [0, 1, 3, 17, 130])
@pytest.mark.parametrize(("outputs", "features", "block"), [(5, 16, 16), (33, 96, 32), (70, 512, 512), (100, 512, 256)])
@pytest.mark.parametrize("form", INTEGERS)
def test_int_linear_of_activations_rounded_in_two_steps(kernels, draw, form, tokens, outputs, features, block):
    x = normal(draw, tokens, features)
    weight, plain = stored_int(form, normal(draw, outputs, features), block)
    found = kernels.linear(x, weight, outputs, twice=True)
    values, scales = judge.round_activations(x, block)
    first = (values * scales[..., None].astype(np.float64)).reshape(x.shape)
    one, sizes = judge.rounded_linear(x, plain)
    other, more = judge.rounded_linear((x - first).astype(np.float32), plain)
    # of what the first step leaves, float32 may round two values the other way, each by a 254th of the first's
    wide = dequantize(plain).astype(np.float64)
    flipped = scales.max(-1, initial=0)[:, None] / 127 * np.abs(wide).max(-1)
    assert np.all(np.abs(found - one - other) <= 1e-6 * (sizes + more) + flipped)
    exact = x @ wide.T
    assert np.linalg.norm(found - exact) <= 1e-4 * np.linalg.norm(exact)
    # a token's outcome does not depend on others
    for t in range(min(tokens, 2)):
        assert_array_equal(kernels.linear(x[t : t + 1], weight, outputs, twice=True)[0], found[t])


@pytest.mark.parametrize("block", [32, 64, 96, 256])
@pytest.mark.parametrize("form", INTEGERS)
def test_integer_sums_are_exact_at_the_extremes(kernels, draw, form, block):
    """Largest magnitudes and equal signs: where a 16-bit intermediate would saturate."""
    grid, outputs = GRIDS[form], 40
    next_one = grid.low + 1 if grid.name == "even" else NORMAL_LEVELS[grid.bits][1]
    values = draw.choice([grid.low, next_one, grid.high], (outputs, block)).astype(np.float32)
    values[0], values[1] = grid.low, grid.high
    scales = np.exp2(draw.integers(-3, 3, (outputs, 1))).astype(np.float32)
    plain = pack(values, scales, bits=grid.bits, block=block, grid=grid.name)
    panels = pack_panels(plain)
    held = panels.scales.astype(np.float16) if form.endswith("f16") else panels.scales
    x = draw.choice(np.float32([-127, 127]), (7, block))
    x[0], x[1] = 127, -127  # activation scales are then exactly 1
    found = kernels.linear(x, Weight(form, panels.packed, held, block), outputs)
    assert_array_equal(found, x.astype(np.float64) @ (values * scales).T.astype(np.float64))


def test_blocks_of_zeros_and_of_almost_nothing_count_as_zero(kernels, draw):
    weight, plain = stored_int("int8", normal(draw, 20, 96), 32)
    x = normal(draw, 2, 96)
    x[0, :32], x[0, 32:64], x[1] = 0, 1e-32, 0
    found = kernels.linear(x, weight, 20)
    assert_close(found, *judge.rounded_linear(x, plain), error=1e-6)
    assert not found[1].any()


@pytest.mark.parametrize("form", ["int8", "int8 twice", "f32", "e4m3"])
@pytest.mark.parametrize("tokens", [1, 7])
def test_a_nan_stays_in_its_token(kernels, draw, form, tokens):
    matrix = normal(draw, 20, 64)
    name, _, twice = form.partition(" ")
    weight = {"int8": lambda: stored_int("int8", matrix, 32)[0], "e4m3": lambda: stored_e4m3(matrix)[0]}.get(
        name, lambda: Weight("f32", matrix)
    )()
    x = normal(draw, tokens + 1, 64)
    x[0, 40] = np.nan
    found = kernels.linear(x, weight, 20, bool(twice))
    assert np.isnan(found[0]).all()
    assert np.isfinite(found[1:]).all()


def experts(draw, gate_up_form, down_form, count, hidden, width, block):
    """Stored experts, and the float64 weights [E, H, 2F] and [E, F, H] they stand for."""
    gate_up = normal(draw, count, hidden, 2 * width) * np.float32(hidden**-0.5)
    down = normal(draw, count, width, hidden) * np.float32(width**-0.5)
    stored, wide = [], []
    for form, weight, halves in ((gate_up_form, gate_up, True), (down_form, down, False)):
        rows = np.ascontiguousarray(weight.swapaxes(1, 2))
        if form in EXACT:
            stored.append(Weight(form, weight.astype(EXACT[form])))
            wide.append(stored[-1].data.astype(np.float64))
            continue
        if form == "e4m3":
            one, values = stored_e4m3(rows, halves)
        else:
            one, plain = stored_int(form, rows, block, halves)
            values = dequantize(plain).astype(np.float64)
        stored.append(one)
        wide.append(values.swapaxes(1, 2))
    return pack_experts(*stored), wide


ROUTES = {
    "none": lambda draw, experts: np.zeros((0, 1), np.int64),
    "one token": lambda draw, experts: np.array([[experts - 1]]),
    "all to one": lambda draw, experts: np.full((17, 1), 1),
    "spread": lambda draw, experts: draw.integers(0, experts, (9, 1)),
    "two each": lambda draw, experts: draw.integers(0, experts, (13, 2)),
    "some to none": lambda draw, experts: np.array([[0], [-1], [experts], [2], [2]]),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("gate_up", "down"),
    [
        *((form, form) for form in ("f32", "bf16", "e4m3", "int8", "int4")),
        ("bf16", "int4"),
        ("int4_f16", "int8_f16"),
        ("grid4_f16", "int8_f16"),
        *(("int4_f16", form) for form in SMALL),
        ("grid2_f16", "grid3_f16"),
    ],
)
def test_dispatch(kernels, draw, gate_up, down, route):
    hidden, width, count = 96, 160, 4
    stored, wide = experts(draw, gate_up, down, count, hidden, width, 32)
    expert_id = ROUTES[route](draw, count)
    x = normal(draw, len(expert_id), hidden)
    score = draw.uniform(0.1, 1, expert_id.shape).astype(np.float32)
    found = kernels.dispatch(x, expert_id, score, stored, width)
    wanted = judge.dispatch(x, expert_id, score, *wide)
    rounds = {gate_up, down} & {"int8", "int4", *INTEGERS}
    assert np.linalg.norm(found - wanted) <= (0.02 if rounds else SUM_ERROR) * np.linalg.norm(wanted)
    assert not found[(expert_id < 0).all(1) | (expert_id >= count).all(1)].any()


@pytest.mark.parametrize(("form", "hidden", "width"), [("f32", 30, 37), ("bf16", 5, 70), ("e4m3", 30, 37)])
@pytest.mark.parametrize("tokens", [2, 20])
def test_dispatch_of_sizes_that_fill_no_vector(kernels, draw, form, hidden, width, tokens):
    stored, wide = experts(draw, form, form, 3, hidden, width, 0)
    expert_id = draw.integers(0, 3, (tokens, 1))
    x, score = normal(draw, tokens, hidden), draw.uniform(0.1, 1, (tokens, 1)).astype(np.float32)
    wanted = judge.dispatch(x, expert_id, score, *wide)
    found = kernels.dispatch(x, expert_id, score, stored, width)
    assert np.linalg.norm(found - wanted) <= SUM_ERROR * np.linalg.norm(wanted)


@pytest.mark.parametrize("form", INTEGERS)
@pytest.mark.parametrize("tokens", [1, 11])
def test_int_dispatch_is_two_rounded_products(kernels, draw, form, tokens):
    """Against the same rounding in numpy: the only difference left is float32 arithmetic."""
    hidden, width, block = 64, 96, 32
    rows = [normal(draw, 2, n, k) / np.float32(k**0.5) for n, k in ((2 * width, hidden), (hidden, width))]
    gate_up, plain_gate_up = stored_int(form, rows[0], block, gate_up=True)
    down, plain_down = stored_int(form, rows[1], block)
    expert_id = draw.integers(0, 2, (tokens, 1))
    x, score = normal(draw, tokens, hidden), draw.uniform(0.1, 1, (tokens, 1)).astype(np.float32)
    found = kernels.dispatch(x, expert_id, score, pack_experts(gate_up, down), width)
    flips = 0
    for t, (e,) in enumerate(expert_id):
        one, two = (replace(p, packed=p.packed[e], scales=p.scales[e]) for p in (plain_gate_up, plain_down))
        both, _ = judge.rounded_linear(x[t : t + 1] * score[t], one)
        inner = (judge.silu(both[:, :width]) * both[:, width:]).astype(np.float32)
        wanted, magnitude = judge.rounded_linear(inner, two)
        # an `inner` that lies on a rounding edge may fall on its other side, a step away
        flips += int(np.any(np.abs(found[t] - wanted[0]) > 3e-6 * magnitude[0]))
        step = np.abs(inner).max() / 127 * np.abs(dequantize(two)).max(-1)
        assert np.all(np.abs(found[t] - wanted[0]) <= 1.01 * step)
    assert flips <= tokens // 5


@pytest.mark.parametrize("outputs", [1, 4, 7, 12, FEW_OUTPUTS, FEW_OUTPUTS + 44])
@pytest.mark.parametrize("form", [*EXACT, "e4m3", *INTEGERS])
def test_a_row_has_the_same_bits_whatever_rows_are_beside_it(kernels, draw, form, outputs):
    """As `TvmBackend.packs` says; exact matrices of many outputs are summed in two orders, as `few_rows` says."""
    plain = normal(draw, outputs, 512)
    if form in EXACT:
        weight = Weight(form, plain.astype(EXACT[form]))
    else:
        weight, _ = stored_e4m3(plain) if form == "e4m3" else stored_int(form, plain, 256)
    x = normal(draw, 40, 512)
    few, many = (1, 2, 3, 4, 5, 8), (9, 11, 16, 23, 40)
    for counts in (few, many) if form in EXACT and outputs > FEW_OUTPUTS else ((*few, *many),):
        first, *others = (kernels.linear(x[:count], weight, outputs) for count in counts)
        for other in others:
            assert_array_equal(other[: len(first)], first)
        shifted = kernels.linear(x[2 : 2 + counts[1]], weight, outputs)
        assert_array_equal(shifted[: counts[1] - 2], kernels.linear(x[: counts[1]], weight, outputs)[2:])


@pytest.mark.parametrize("form", ["f32", "int8"])
def test_results_do_not_depend_on_the_number_of_parts(library, draw, form):
    hidden, width = 96, 160
    stored, _ = experts(draw, form, form, 4, hidden, width, 32)
    x, expert_id = normal(draw, 21, hidden), draw.integers(0, 4, (21, 1))
    score = draw.uniform(0.1, 1, (21, 1)).astype(np.float32)
    one, *others = (Guarded(library, parts).dispatch(x, expert_id, score, stored, width) for parts in (1, 2, 7))
    for other in others:
        assert_array_equal(other, one)


@pytest.mark.parametrize("form", ["bf16", "e4m3", *INTEGERS])
@pytest.mark.parametrize("route", ["spread", "two each", "some to none"])
def test_experts_may_be_computed_in_any_order_some_at_a_time(library, draw, form, route):
    hidden, width = 96, 160
    stored, _ = experts(draw, form, form, 4, hidden, width, 32)
    expert_id = ROUTES[route](draw, 4)
    x, score = normal(draw, len(expert_id), hidden), draw.uniform(0.1, 1, expert_id.shape).astype(np.float32)
    together, one_by_one, others = (
        Guarded(library, 2).dispatch(x, expert_id, score, stored, width, waves)
        for waves in (None, [[3], [0], [2], [1]], [[], [1, 2], [0, 3]])
    )
    assert_array_equal(one_by_one, together)
    assert_array_equal(others, together)


@pytest.mark.parametrize("form", ["bf16", "e4m3", *INTEGERS])
@pytest.mark.parametrize("choices", [1, 2])
def test_rows_of_an_expert_may_be_computed_some_at_a_time(library, draw, form, choices):
    hidden, width, tokens = 96, 160, 90
    stored, _ = experts(draw, form, form, 4, hidden, width, 32)
    expert_id = draw.integers(-1, 5, (tokens, choices))  # some of no expert
    x, score = normal(draw, tokens, hidden), draw.uniform(0.1, 1, expert_id.shape).astype(np.float32)
    counts = [int((expert_id == expert).sum()) for expert in range(4)]
    starts = np.cumsum([0, *counts])
    cuts = sorted({*starts.tolist(), *(int(start + 8) for start in starts[:-1])})
    together, cut = (
        Guarded(library, 2).dispatch(x, expert_id, score, stored, width, cuts=some) for some in (None, cuts)
    )
    assert len(cuts) == 9
    assert_array_equal(cut, together)


def test_a_level_that_there_is_not_changes_nothing(library):
    kernels = Kernels(library)
    before = kernels.level()
    assert not kernels.use_level("altivec")
    assert kernels.level() == before


def test_an_architecture_without_kernels_is_refused(tmp_path):
    with pytest.raises(ArrieroError, match="no kernels for 'riscv64'; expected one of x86_64, aarch64"):
        build_kernels("riscv64", tmp_path / "kernels.o")


@pytest.mark.parametrize(("machine", "package"), [("other", "g\\+\\+-aarch64-linux-gnu"), ("aarch64", "g\\+\\+`? ?on")])
def test_a_missing_compiler_is_named_with_its_package(monkeypatch, machine, package):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MachineLacks, match=f"apt-get install {package}"):
        find_compiler("aarch64")


def test_code_of_one_level_is_in_no_other(library):
    """Instructions of AVX-512 and of AMX stand in the functions of their own levels only."""
    if HERE != "x86_64" or shutil.which("objdump") is None:
        pytest.skip("needs an x86-64 machine with binutils")
    listing = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", library], capture_output=True, text=True, check=True
    ).stdout
    users: dict[str, set[str]] = {"%zmm": set(), "%k1": set(), "%tmm": set()}
    for line in listing.splitlines():
        if line.endswith(">:"):
            level = re.search(r"(\w+)::", line)
        for register in users:
            if register in line:
                users[register].add(level[1] if level else line)
    assert users["%zmm"] == {"amx", "avx512vnni"} >= users["%k1"]
    assert users["%tmm"] == {"amx"}


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("#!/bin/sh\necho 'g++: error: unrecognized -std=c++17' >&2; exit 1", "error: unrecognized -std=c++17"),
        (
            "#!/bin/sh\ncase \"$*\" in *avx512vnni*|*i8mm*) echo 'error: bad -march' >&2; exit 1;; esac\nexit 0",
            "error: bad -march",
        ),
        ("#!/bin/sh\nexit 0", "it writes no file"),
        ("no program", "Exec format error"),
    ],
)
def test_a_compiler_that_is_none_for_the_kernels_is_refused_before_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, reason: str
) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text(script)
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(MachineLacks, match=rf"g\+\+: the C\+\+ compiler .*: {re.escape(reason)}.*expected GCC 12"):
        check_compiler(platform.machine())


def test_a_compiler_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_compiler(platform.machine()) == find_compiler(platform.machine())
    monkeypatch.setattr(subprocess, "run", None)
    check_compiler(platform.machine())
