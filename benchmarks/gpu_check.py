"""Every kernel on the GPU against float64 numpy: odd shapes, rings that wrap, released shapes, stray ids.

Results are poisoned first, so that what a kernel leaves out is seen; rows of `inner` that no expert writes must keep
the poison.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import checkout  # noqa: F401
import numpy as np

from arriero.export.compile.cuda.launch import FORMS, OPS, SHAPES, Kernel
from arriero.tests.dispatch_cases import draw_case

# Of the largest result: its rounding, and sums in float32. Tensor cores keep fewer bits of sums of E4M3 products:
# 13 of the fraction, of which every product cuts off half a unit on average, until they are moved after 128 features.
WORST = {"f16": 2.0**-11 + 1e-5, "bf16": 2.0**-8 + 1e-5}
FP8_SUMS = 2.0**-13
POISON = 0x7E5A  # a NaN in float16, and no likely result in bfloat16
EXPERTS = 5
CASES = ("odd", "long", "released")
Shapes = Sequence[tuple[str, int, int, int]]  # form, block, hidden, expert width
ODD: Shapes = [
    ("exact", 0, 80, 48),
    ("int8", 0, 80, 48),
    ("fp8", 0, 208, 48),
    ("int4", 32, 160, 96),
    ("int4", 64, 192, 64),
    ("int4", 128, 256, 128),
]
# more groups than are in flight, so that the copies' rings wrap; exact rows end within a group
LONG: Shapes = [
    ("exact", 0, 2064, 2064),
    ("int8", 0, 2048, 2048),
    ("fp8", 0, 2048, 2048),
    *(("int4", block, 2048, 2048) for block in (32, 64, 128)),
]
# Llama 4 Scout's
RELEASED: Shapes = [(form, 128 if form == "int4" else 0, 5120, 8192) for form in FORMS]
STRAYS = np.array([[2], [-1], [EXPERTS], [2], [99], [0], [-7]])
SHORT_ROUTES = {"one token": np.array([[2]]), "strays": STRAYS}
ROUTES = {
    "spread": np.random.default_rng(1).integers(0, 4, (75, 1)),
    "top-2": np.random.default_rng(2).permuted(np.tile(np.arange(4), (11, 1)), axis=1)[:, :2],
    "65 to one": np.full((65, 1), 3),
    "70 to one, with strays": np.concatenate([np.full((70, 1), 3), STRAYS]),
    **SHORT_ROUTES,
}


def cases(kinds: Collection[str]) -> Iterator[tuple[str, int, int, int, int, Mapping[str, np.ndarray]]]:
    """Form, block, hidden, expert width, experts and routes of all cases of `kinds`, of CASES."""
    for shape in ODD if "odd" in kinds else ():
        yield *shape, EXPERTS, ROUTES
    for shape in LONG if "long" in kinds else ():
        yield *shape, EXPERTS, {name: ROUTES[name] for name in ("65 to one", *SHORT_ROUTES)}
    for shape in RELEASED if "released" in kinds else ():
        # two experts, the second one beyond what the first one's rows could reach
        yield *shape, 2, {"both, with a stray": np.array([*[[1]] * 65, [0], [-1]])}


def allowance(activation: str, form: str) -> float:
    """The largest error of a right kernel, of the largest value."""
    return WORST[activation] + (FP8_SUMS if form == "fp8" else 0)


def check(
    gpu: Any, forms: Sequence[str], kinds: Collection[str] = CASES, done: Callable[[str], None] = lambda _: None
) -> list[dict[str, Any]]:
    """One row per kernel and routing: the largest error, of the largest value, and whether it is small enough."""
    rows = []
    for form, block, hidden, ffn, experts, routes in cases(kinds):
        if form not in forms:
            continue
        for activation, (route, ids) in product(FORMS[form], routes.items()):
            case = draw_case(ids, form, activation, hidden=hidden, ffn=ffn, experts=experts, block=block)
            for op in OPS:
                expected = case.expected(op)
                for shape in SHAPES:
                    kernel, result = Kernel(op, shape, activation, form), case.result(op)
                    result.view(np.uint16)[...] = POISON
                    gpu.run(kernel, case.arrays(op), case.sizes, result)
                    row = {"kernel": kernel.name, "hidden": hidden, "ffn": ffn, "block": block, "route": route}
                    rows.append({**row, **judge(result, expected, allowance(activation, form))})
        done(f"{form} {hidden} x {ffn}" + (f", blocks of {block}" if block else ""))
    return rows


def judge(result: np.ndarray, expected: np.ndarray, worst: float) -> dict[str, Any]:
    """The largest error, whether it is at most `worst`, and whether rows of NaN in `expected` still have the poison."""
    written = ~np.isnan(expected)
    difference = np.abs(result.astype(np.float64) - expected)[written]
    error = float(difference.max() / np.abs(expected[written]).max())
    kept = bool((result.view(np.uint16)[~written] == POISON).all())
    return {"error": error, "right": kept and error < worst}  # which not-a-number is not
