"""How fast this machine is, measured in well under a second: what `plan` makes its times of."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

SIDE = 768  # of the matrices that are multiplied
COPIED = 32 << 20  # bytes
ROUNDS = 3


@dataclass(frozen=True)
class MachineSpeed:
    """Floating-point operations of a float32 product, bytes copied, and bytes hashed, each per second."""

    flops: float
    copied: float
    hashed: float


def measure_speed() -> MachineSpeed:
    """Measure this machine as it is now, other work included."""
    left, block = np.ones((SIDE, SIDE), np.float32), np.ones(COPIED // 4, np.float32)
    content = bytes(COPIED // 4)
    return MachineSpeed(
        flops=2 * SIDE**3 / _best(lambda: left @ left),
        copied=COPIED / _best(block.copy),
        hashed=len(content) / _best(lambda: hashlib.sha256(content).digest()),
    )


def _best(run: Callable[[], object]) -> float:
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return max(min(times), 1e-9)
