"""Expert coverage: how many calibration tokens the router really sends to each expert of each MoE layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from arriero.profiles.data import Sample
    from arriero.runtimes.session import Session

Coverage = dict[int, list[int]]


def count_experts(
    session: Session, samples: Sequence[Sample], progress: Callable[[int, int], None] | None = None
) -> Coverage:
    """Per MoE layer, tokens per expert [E] over the prompts of `samples`; `progress(done, total)` after each."""
    spec = session.spec
    counts = {
        layer: np.zeros(spec.num_local_experts, np.int64) for layer, kind in enumerate(spec.layers) if kind.ffn == "moe"
    }
    for done, sample in enumerate(samples, 1):
        prompt = session.encode(sample.messages, sample.images)
        taps = session.logits(prompt.input_ids, prompt.pixel_values, taps=True)
        for layer, ids in taps.expert_ids.items():
            counts[layer] += np.bincount(ids.ravel(), minlength=spec.num_local_experts)
        if progress:
            progress(done, len(samples))
    return {layer: [int(n) for n in count] for layer, count in counts.items()}


def unseen_experts(coverage: Coverage) -> list[tuple[int, int]]:
    """(layer, expert) of every expert that no token reached."""
    return [(layer, expert) for layer, counts in coverage.items() for expert, n in enumerate(counts) if n == 0]
