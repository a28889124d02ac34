"""A session's memory does not grow with the number of different steps that it has taken."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from arriero.runtimes.step_memory import KEPT, StepMemory

MIB = 1 << 20


def test_steps_of_known_sizes_empty_nothing_and_new_ones_only_what_would_be_too_much() -> None:
    emptied: list[str] = []
    memory = StepMemory(100, lambda: emptied.append(now))
    for now, nbytes in (
        ("60", 60), ("70", 70), ("60", 60), ("70", 70),
        ("80", 80),  # beside 60 and 70 more than two of the largest
        ("80", 80), ("60", 60),
        ("300", 300),  # the largest now, of which two may be kept from here on
        ("200", 200),
    ):  # fmt: skip
        memory.before(now, nbytes)
    assert emptied == ["80", "200"]


# In a process of its own: in this one other tests' memory comes and goes.
STEPS = """
import sys
import numpy as np
import arriero
from arriero.runtimes.memory import anonymous_memory

most = 120
with arriero.load(sys.argv[1], threads=1) as session:
    backend, ids = session.backend, np.random.default_rng(0).integers(3, 500, most)
    cache = backend.new_cache(most, 8)

    def step(rows):
        some = cache.rows(0, rows)
        embeds = backend.embed(ids[:rows, None], np.zeros((0, backend.spec.hidden_size), np.float32))
        backend.forward(embeds, some.lengths[:, None].copy(), some, np.array([0]))
        for row in range(rows):
            cache.truncate(row, 0)

    one = backend._step_bytes(most) - backend._step_bytes(0) + 4 * backend.spec.vocab_size * most
    step(most)
    before = anonymous_memory()
    for rows in range(1, most):
        step(rows)
    print(most, one, anonymous_memory() - before)
"""


def test_a_session_keeps_the_memory_of_few_steps_however_many_sizes_it_saw(tvm_workshop: Path) -> None:
    command = [sys.executable, "-c", STEPS, str(tvm_workshop / "bundles" / "fp32")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    most, one, grown = map(int, done.stdout.split())
    every = sum(range(1, most)) / most * one  # that would be kept
    assert grown < KEPT * one + 10 * MIB < every / 2
