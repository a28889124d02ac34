"""The CUDA kernels' own source, compiled for the CPU and run thread by thread, against float64 numpy."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import cycle, product

import numpy as np
import pytest
import torch

from arriero.errors import ArrieroError
from arriero.export.compile.cuda.launch import (
    DECODE_WARPS,
    ITEMS,
    KERNELS,
    MOST_EXPERTS,
    OPS,
    PREFILL_WARPS,
    SHAPES,
    TILES,
    Kernel,
    activations_of,
    check_sizes,
)
from arriero.graphs.ops import expert_dispatch
from arriero.graphs.stored.expert_plugins import INNER_SCALES
from tests.cuda_emulator import (
    SOURCES,
    Broken,
    EmulatedGpu,
    backward,
    build_altered,
    cached_library,
    forward,
    shuffled,
)
from tests.dispatch_cases import Case, draw_case

# float32 sums of up to a thousand terms, in any order, relative to the largest result
SUM_ERROR = 1e-5
# rounding the result: half a unit in the last place of 10 (f16) or 7 bits (bf16)
ROUNDING = {"f16": 2.0**-11, "bf16": 2.0**-8}
# form, block and sizes that are odd for it: no multiples of a group, of a warp's share or of a block of outputs
FORMS = {
    "exact": ("exact", 0, 80, 48),
    "int8": ("int8", 0, 80, 176),
    "fp8": ("fp8", 0, 208, 48),
    "int4-b32": ("int4", 32, 160, 96),
    "int4-b64": ("int4", 64, 192, 64),
    "int4-b128": ("int4", 128, 256, 128),
}
EXPERTS = 5


@pytest.fixture(scope="module")
def gpu(request):
    return EmulatedGpu(cached_library(request.config))


def ids(tokens: int, choices: int = 1, experts: int = EXPERTS, seed: int = 1) -> np.ndarray:
    """Different experts for each token; the last expert gets none."""
    draw = np.random.default_rng(seed)
    return np.stack([draw.permutation(experts - 1)[:choices] for _ in range(tokens)])


def draw(name: str, activation: str, expert_id: np.ndarray, experts: int = EXPERTS) -> Case:
    form, block, hidden, ffn = FORMS[name]
    return draw_case(expert_id, form, activation, hidden=hidden, ffn=ffn, experts=experts, block=block)


def error(values: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, of the largest value expected; both have their NaNs in the same places."""
    np.testing.assert_array_equal(np.isnan(values), np.isnan(expected))
    return float(np.nanmax(np.abs(values - expected)) / np.nanmax(np.abs(expected)))


def judge(gpu: EmulatedGpu, case: Case, op: str, shape: str, **how) -> np.ndarray:
    """Run one kernel and hold it to the reference; gives its result."""
    kernel, result, expected = Kernel(op, shape, case.activation, case.form), case.result(op), case.expected(op)
    exact = gpu.launch(kernel, case.arrays(op), case.sizes, result, **how)
    assert error(exact, expected) < SUM_ERROR
    stored = result.astype(np.float64)
    bound = ROUNDING[case.activation] * np.abs(exact) + 1e-7
    assert (np.isnan(exact) | (np.abs(stored - exact) <= bound)).all()
    if case.activation == "f16":
        assert error(stored, expected) < 1e-2
    return result


@pytest.mark.parametrize("expert_id", [ids(37, 2), np.full((19, 1), 3), np.array([[1, 1], [2, 1], [1, 2]])])
@pytest.mark.parametrize("name", FORMS)
def test_the_judge_is_the_dispatch_of_the_reference_model(name, expert_id):
    """Both operators of a case, one after the other, in float64."""
    case = draw(name, "f16", expert_id)
    x, score = torch.tensor(case.x.astype(np.float64)), torch.tensor(case.score.astype(np.float64))
    gate_up, down = (torch.tensor(stack.values).mT for stack in (case.gate_up, case.down))
    expected = expert_dispatch(x, torch.tensor(case.expert_id, dtype=torch.int64), score, gate_up, down)
    inner = case.gate_up_rows()
    if case.form in ("int8", "fp8"):
        inner /= case.inner_scale  # as the graph's multipliers do
    y = replace(case, inner=inner).down_rows()
    np.testing.assert_allclose(y, expected.numpy(), rtol=1e-11, atol=1e-11 * float(expected.abs().max()))


@pytest.mark.parametrize("name", FORMS)
def test_equals_the_reference(gpu, name):
    for activation in activations_of(FORMS[name][0], name):
        for choices, op, shape in product((1, 2), OPS, SHAPES):
            judge(gpu, draw(name, activation, ids(11, choices)), op, shape)


@pytest.mark.parametrize("tokens", [1, 8, 9, 63, 64, 65, 130])
def test_any_number_of_tokens_to_one_expert(gpu, tokens):
    for name, op, shape in product(("exact", "int8", "int4-b32"), OPS, SHAPES):
        judge(gpu, draw(name, "f16", np.full((tokens, 1), 3)), op, shape)


@pytest.mark.parametrize("choices", [1, 3])
def test_many_tokens_over_many_experts(gpu, choices):
    """More than 32 experts, so that finding a tile takes several rounds of a warp; most have no token."""
    expert_id = ids(150, choices, experts=70) % 69
    expert_id[expert_id % 3 == 1] = 68
    for op, shape in product(OPS, SHAPES):
        case = draw_case(expert_id, "int8", "f16", hidden=32, ffn=16, experts=70)
        judge(gpu, case, op, shape)


@pytest.mark.parametrize("name", FORMS)
def test_long_rows_go_round_the_pipeline(gpu, name):
    """Exact rows end within a group; one of the tokens is of no expert."""
    form, block, _, _ = FORMS[name]
    short, long = block or 16, 2064 if form == "exact" else 2048
    expert_id = ids(5, experts=3)
    expert_id[3] = -1
    for op, shape in product(OPS, SHAPES):
        hidden, ffn = (long, short) if op == "gate_up" else (short, long)
        case = draw_case(expert_id, form, "f16", hidden=hidden, ffn=ffn, experts=3, block=block)
        judge(gpu, case, op, shape)


@pytest.mark.parametrize("name", ["exact", "int8", "fp8", "int4-b128"])
def test_rows_of_the_released_model(gpu, name):
    """Scout's hidden 5,120 and experts of 8,192, as far as a few outputs go."""
    form, block, _, _ = FORMS[name]
    for op, shape in product(OPS, SHAPES):
        hidden, ffn = (5120, block or 16) if op == "gate_up" else (block or 16, 8192)
        case = draw_case(np.array([[1], [0], [1]]), form, "f16", hidden=hidden, ffn=ffn, experts=2, block=block)
        judge(gpu, case, op, shape)


@pytest.mark.parametrize("choices", [1, 2])
def test_a_token_of_no_expert_adds_nothing(gpu, choices):
    expert_id = ids(13, choices)
    expert_id[[2, 5, 7], 0] = [-1, EXPERTS, 99]
    expert_id[9] = -7
    for name, op, shape in product(FORMS, OPS, SHAPES):
        judge(gpu, draw(name, "f16", expert_id), op, shape)


@pytest.mark.parametrize("op", OPS)
def test_many_tokens_of_no_expert(gpu, op):
    """More than a decode kernel's block takes at once, in a row of their own."""
    expert_id = np.full((29, 1), -1)
    expert_id[17:19] = 2
    for shape, order in product(SHAPES, (forward, backward)):
        judge(gpu, draw("int8", "f16", expert_id), op, shape, order=order, restless=True)


def test_the_last_tokens_first_choice_is_no_expert(gpu):
    """No barrier follows their turn, so nothing but one before the next choice keeps its ids apart."""
    expert_id = ids(13, 2)
    expert_id[10:, 0] = -1
    for op, shape, order in product(OPS, SHAPES, (forward, backward)):
        judge(gpu, draw("exact", "f16", expert_id), op, shape, order=order)


def test_no_token_of_any_expert(gpu):
    for op, shape in product(OPS, SHAPES):
        case = draw("int8", "f16", np.full((3, 1), -1))
        result = case.result(op)
        gpu.launch(Kernel(op, shape, "f16", "int8"), case.arrays(op), case.sizes, result)
        assert (np.isnan(result) if op == "gate_up" else result == 0).all()


@pytest.mark.parametrize("name", FORMS)
def test_what_float16_does_not_hold_comes_through(gpu, name):
    """Results of SwiGLU near 10^6, which a token's experts may give where a model was trained in bfloat16."""
    case = draw(name, "f16", ids(9))
    case = replace(case, score=case.score * np.float32(2**6))
    largest = np.nanmax(np.abs(case.gate_up_rows())) / case.inner_scale
    case = replace(case, score=case.score * np.float32((6e5 / largest) ** 0.5))  # where SwiGLU is a product
    assert np.nanmax(np.abs(case.gate_up_rows())) / case.inner_scale > np.finfo(np.float16).max
    for shape in SHAPES:
        assert np.isfinite(judge(gpu, case, "gate_up", shape)).all()


def test_a_token_that_chooses_an_expert_twice_gets_it_twice(gpu):
    for op, shape in product(OPS, SHAPES):
        judge(gpu, draw("int8", "f16", np.array([[1, 1], [2, 1], [1, 2]])), op, shape)


def test_weights_of_unrouted_experts_are_not_touched(gpu):
    """Only the rows of experts 0 and 3 may be read, of weights and of scales."""
    for name, op, shape in product(("int8", "int4-b32"), OPS, SHAPES):
        case = draw(name, "f16", np.array([[0], [3], [0]]))
        arrays = case.arrays(op)
        touch = [*arrays[:-2], *(array[expert] for array in arrays[-2:] for expert in (0, 3))]
        judge(gpu, case, op, shape, touch=touch)
        with pytest.raises(Broken, match="a read outside the inputs"):
            judge(gpu, case, op, shape, touch=touch[:-1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", OPS)
def test_the_result_does_not_depend_on_the_threads_order(gpu, op, shape):
    """Nor on when copies arrive; the same inputs give the same bits."""
    for name, choices in zip(FORMS, cycle((1, 2)), strict=False):
        case = draw(name, "f16", ids(20, choices))
        orders = (forward, backward, shuffled)
        results = [
            judge(gpu, case, op, shape, order=order, late=late, restless=restless).tobytes()
            for order, (late, restless) in product(orders, ((True, False), (False, True)))
        ]
        assert len(set(results)) == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_an_expert_beyond_four_gigabytes(gpu, shape):
    """Scout's shapes: the last expert's weights, in a stack of which only the rows that are read hold memory."""
    hidden, ffn, experts, count = 5120, 8192, 32, 128 if shape == "prefill" else 16
    draw = np.random.default_rng(0)
    stack = np.zeros((experts, 2 * ffn, hidden), np.float16)
    rows = [*range(count), *range(ffn, ffn + count)]
    stack[-1, rows] = 3 * draw.standard_normal((2 * count, hidden), dtype=np.float32) / hidden**0.5
    assert (stack.nbytes // experts) * (experts - 1) > 2**32
    ids, score = np.full((1, 1), experts - 1, np.int32), np.full((1, 1), 0.3, np.float32)
    x, inner = draw.standard_normal((1, hidden)).astype(np.float16), np.full((1, ffn), np.nan, np.float16)
    sizes = {"tokens": 1, "choices": 1, "experts": experts, "hidden": hidden, "ffn": ffn, "block": 0}
    kernel = Kernel("gate_up", shape, "f16", "exact")
    grid = (1, count // 8) if shape == "decode" else (1, count // 64)
    arrays = [x, ids, score, stack, np.zeros(1, np.float32)]
    exact = gpu.launch(kernel, arrays, sizes, inner, touch=[x, ids, score, stack[-1]], grid=grid)
    gate, up = np.split(stack[-1, rows].astype(np.float64) @ (x[0].astype(np.float64) * float(score[0, 0])), 2)
    assert error(exact[0, :count], gate / (1 + np.exp(-gate)) * up * INNER_SCALES["F16"]) < SUM_ERROR


MUTATIONS = {
    "the score scales the result": (
        "operators.h",
        "const float g = gate * s,",
        "const float g = gate,",
        ("gate_up", "decode", "exact"),
    ),
    "warps' sums are added before they are there": (
        "decode.h",
        "            block_barrier();\n            if (warp == 0 && routed) {",
        "            if (warp == 0 && routed) {",
        ("gate_up", "decode", "fp8"),
    ),
    "tokens are read before all threads have copied them": (
        "prefill.h",
        "            block_barrier();\n            request(step",
        "            request(step",
        ("down", "prefill", "exact"),
    ),
    "copies are not waited for": (
        "prefill.h",
        "wait_copies<Shared::TOKEN_DEPTH - 2>();",
        "wait_copies<Shared::TOKEN_DEPTH - 1>();",
        ("down", "prefill", "exact"),
    ),
    "a pipeline too short for its requests": (
        "prefill.h",
        "% Shared::TOKEN_DEPTH",
        "% 2",
        ("gate_up", "prefill", "fp8"),
    ),
    "a scale of the next block": (
        "decode.h",
        "load_float(scales[half] + part);",
        "load_float(scales[half] + part / 2);",
        ("down", "decode", "int4"),
    ),
    "tokens in another order than weights": ("forms.h", "0x6420", "0x6240", ("down", "prefill", "int8")),
    "all rows have the scales of the upper half": (
        "decode.h",
        "op.half(first, half) + lane / 4);",
        "op.half(first, 0) + lane / 4);",
        ("gate_up", "decode", "fp8"),
    ),
}


LONG_MUTATIONS = {
    "tokens of the next warp's group": ("tokens += GROUP * WARPS;", "tokens += GROUP;"),
    "weights of the next warp's group": ("GROUP_BYTES * WARPS;", "GROUP_BYTES;"),
    "weights are read before they are there": ("wait_copies<DEPTH - 2>();", "wait_copies<DEPTH - 1>();"),
    "a ring too short for its requests": ("% DEPTH", "% (DEPTH - 2)"),
    "a row's tokens beyond its end": ("32 * step < features", "32 * step < features + 32"),
}


@pytest.mark.parametrize("mutation", LONG_MUTATIONS)
def test_a_wrong_pipeline_is_found(tmp_path, mutation):
    """Of a decode kernel, by rows of more groups than are in flight."""
    kernel = Kernel("gate_up", "decode", "f16", "exact")
    altered = EmulatedGpu(build_altered(tmp_path, kernel, {"decode.h": LONG_MUTATIONS[mutation]}))
    case = draw_case([[0], [1]], "exact", "f16", hidden=1040, ffn=16, experts=2)
    failures = 0
    for late in (True, False):
        try:
            judge(altered, case, "gate_up", "decode", late=late)
        except AssertionError:
            failures += 1
    assert failures


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_kernel_is_found(tmp_path, mutation):
    """The judge, the emulation and the cases would notice: scores are small enough to tell input from output."""
    file, right, wrong, (op, shape, form) = MUTATIONS[mutation]
    case = draw("int4-b32" if form == "int4" else form, "f16", ids(20))
    gpu = EmulatedGpu(build_altered(tmp_path, Kernel(op, shape, "f16", form), {file: (right, wrong)}))
    failures = 0
    for order, late in product((forward, backward), (True, False)):
        try:
            judge(gpu, case, op, shape, order=order, late=late)
        except AssertionError:
            failures += 1
    assert failures


def test_every_kernel_has_an_entry_of_its_own(gpu):
    assert len({kernel.name for kernel in KERNELS}) == len(KERNELS) == 24
    for kernel in KERNELS:
        assert hasattr(gpu.library, kernel.name)


def test_the_grid_of_a_prefill_has_a_block_for_every_tile(gpu):
    """The worst case: each expert but one has a token more than whole tiles hold, and strays are there."""
    expert_id = np.concatenate([np.full(65, expert) for expert in range(EXPERTS)] + [np.full(1, -1)])[:, None]
    for op in OPS:
        judge(gpu, draw("exact", "f16", expert_id), op, "prefill")


def test_the_sizes_told_to_python_are_the_sources():
    """`launch.py` says again what the sources say."""
    prefill, operators = ((SOURCES / name).read_text() for name in ("prefill.h", "operators.h"))
    assert f"MAX_EXPERTS = {MOST_EXPERTS};" in prefill
    assert f"COLUMNS = {ITEMS}," in prefill
    assert f"PREFILL_WARPS = {PREFILL_WARPS}," in prefill
    assert int(re.search(r"ROW_TILES = (\d+)", prefill)[1]) * PREFILL_WARPS == TILES
    warps = dict(re.findall(r"struct (\w+)[^}]*?DECODE_WARPS = (\d+);", (SOURCES / "forms.h").read_text()))
    bases = {"exact": "Exact", "int8": "Bytes", "fp8": "Bytes", "int4": "Int4"}
    assert {form: int(warps[base]) for form, base in bases.items()} == DECODE_WARPS
    assert re.findall(r"TILE_OUTPUTS = (\d+)", operators) == ["8", "16"]
    assert f"INNER_SCALE = {INNER_SCALES['BF16']}f;" in operators
    assert f"INNER_SCALE<Half> = 1.0f / {1 / INNER_SCALES['F16']:.0f};" in operators


@pytest.mark.parametrize(
    ("op", "form", "experts", "hidden", "ffn", "block", "message"),
    [
        ("gate_up", "int8", 4, 40, 64, 0, "the hidden size is 40; expected a multiple of 16"),
        ("down", "exact", 4, 64, 0, 0, "the expert width is 0; expected a multiple of 16"),
        ("down", "exact", 513, 64, 64, 0, "513 experts; expected 1 to 512"),
        ("down", "int4", 4, 64, 96, 64, "the expert width is 96; expected a multiple of the block, 64"),
        ("gate_up", "int4", 4, 64, 64, 16, "blocks of 16 weights per scale; expected one of 32, 64, 128"),
        ("gate_up", "fp8", 4, 64, 64, 32, "a block of 32; expected 0: fp8 has none"),
        ("down", "int8", 4, 64, 133152, 0, "the expert width is 133152; expected at most 133144, whose sums fit"),
    ],
)
def test_sizes_that_it_does_not_compute_are_refused(op, form, experts, hidden, ffn, block, message):
    with pytest.raises(ArrieroError, match=re.escape(message)) as refusal:
        check_sizes(op, form, experts, hidden, ffn, block, "layer 3")
    assert str(refusal.value).startswith("layer 3: ")
    check_sizes("gate_up", "int4", 4, 64, 96, 64, "layer 3")
    check_sizes("gate_up", "int8", 4, 64, 133152, 0, "layer 3")


def test_a_form_without_kernels_is_refused():
    with pytest.raises(ArrieroError, match=r"layer 3: .*weights in 'fp4'; expected exact, int8, fp8, int4"):
        activations_of("fp4", "layer 3")
