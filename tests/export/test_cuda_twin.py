"""The expert dispatch in Triton, in its interpreter: held to the reference, and the CUDA kernels held to it."""

from __future__ import annotations

import importlib
from itertools import product

import numpy as np
import pytest
import torch

from arriero.export.compile.cuda.launch import OPS, SHAPES, Kernel
from tests.cuda_emulator import EmulatedGpu, cached_library
from tests.dispatch_cases import Case, draw_case

TYPES = {torch.float32: 1e-5, torch.float16: 1e-2}
ROUTES = {
    "one token": np.array([[2]]),
    "top-2, two experts without a token": np.random.default_rng(0).integers(0, 4, (37, 2)) * 2 % 6,
    "all to one": np.full((19, 1), 3),
}


@pytest.fixture(scope="module")
def twin():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        pytest.importorskip("triton", reason="needs triton: pip install 'triton==3.9.*'")
        yield importlib.import_module("tests.triton_twin")


@pytest.fixture(scope="module")
def gpu(request):
    return EmulatedGpu(cached_library(request.config))


def run(twin, case: Case, op: str, dtype: torch.dtype) -> np.ndarray:
    def tensor(values: np.ndarray) -> torch.Tensor:
        return torch.tensor(values.astype(np.float32)).contiguous()

    expert_id = torch.tensor(case.expert_id)
    stack = case.gate_up if op == "gate_up" else case.down
    weights = tensor(np.swapaxes(stack.values, 1, 2)).contiguous().to(dtype)
    if op == "gate_up":
        result = twin.gate_up(tensor(case.x).to(dtype), expert_id, torch.tensor(case.score), weights)
    else:
        result = twin.down(tensor(case.inner).to(dtype), expert_id, weights)
    assert result.dtype == dtype
    return result.numpy().astype(np.float64)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("op", OPS)
def test_the_twin_equals_the_reference(twin, op, route):
    case = draw_case(ROUTES[route], "exact", "f16", hidden=80, ffn=48, experts=6)
    expected = case.expected(op)
    for dtype, bound in TYPES.items():
        assert np.abs(run(twin, case, op, dtype) - expected).max() < bound * np.abs(expected).max()


@pytest.mark.parametrize(("form", "block"), [("exact", 0), ("int8", 0), ("fp8", 0), ("int8_block", 32), ("int4", 64)])
def test_the_cuda_kernels_equal_the_twin(twin, gpu, form, block):
    case = draw_case(
        ROUTES["top-2, two experts without a token"], form, "f16", hidden=128, ffn=64, experts=6, block=block
    )
    for op, shape in product(OPS, SHAPES):
        exact = gpu.launch(Kernel(op, shape, "f16", form), case.arrays(op), case.sizes, case.result(op))
        twins = run(twin, case, op, torch.float32)
        assert np.abs(exact - twins).max() < 1e-5 * np.abs(twins).max()
