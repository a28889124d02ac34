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

TYPES = {"exact": torch.float16, "int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.float32}
BLOCKS = {"exact": 0, "int8": 0, "fp8": 0, "int4": 64}
ROUTES = {
    "one token": np.array([[2]]),
    "top-2, two experts without a token": np.random.default_rng(0).integers(0, 4, (37, 2)) * 2 % 6,
    "all to one": np.full((19, 1), 3),
}


@pytest.fixture(scope="module")
def twin():
    pytest.importorskip("triton", reason="needs triton: pip install 'triton==3.9.*'")
    return importlib.import_module("tests.triton_twin")


@pytest.fixture(scope="module")
def gpu(request):
    return EmulatedGpu(cached_library(request.config))


def run(twin, case: Case, op: str) -> np.ndarray:

    def tensor(values: np.ndarray) -> torch.Tensor:
        """Of a type that holds the values exactly."""
        return torch.tensor(values.astype(np.float32)).to(TYPES[case.form]).contiguous()

    expert_id = torch.tensor(case.expert_id)
    stack = case.gate_up if op == "gate_up" else case.down
    weights = tensor(np.swapaxes(stack.numbers, 1, 2))
    scales = torch.tensor(stack.scales) if stack.scales.ndim == 2 else torch.ones(stack.numbers.shape[:2])
    if op == "gate_up":
        return twin.gate_up(tensor(case.x), expert_id, torch.tensor(case.score), weights, scales).numpy()
    return twin.down(tensor(case.inner), expert_id, weights, scales).numpy()


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("form", ["exact", "int8", "fp8"])
def test_the_twin_equals_the_reference(twin, form, op, route):
    case = draw_case(ROUTES[route], form, "f16", hidden=80, ffn=48, experts=6)
    expected = case.expected(op)
    assert np.abs(run(twin, case, op) - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("form", BLOCKS)
def test_the_cuda_kernels_equal_the_twin(twin, gpu, form):
    route, block = ROUTES["top-2, two experts without a token"], BLOCKS[form]
    case = draw_case(route, form, "f16", hidden=128, ffn=64, experts=6, block=block)
    for op, shape in product(OPS, SHAPES):
        exact = gpu.launch(Kernel(op, shape, "f16", form), case.arrays(op), case.sizes, case.result(op))
        twins = run(twin, case, op)
        assert np.abs(exact - twins).max() < 1e-5 * np.abs(twins).max()
