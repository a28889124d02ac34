"""What measuring a bundle's parity holds at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from arriero.export.build_file.model_spec import model_spec
from arriero.export.pipeline.cache_plan import CACHE_BYTES, kv_bytes
from arriero.export.pipeline.planned import FLOATS, PlannedTarget
from arriero.graphs.config import ModelConfig
from arriero.graphs.names import EMBEDDING
from arriero.graphs.sources.weight_source import WeightSource
from arriero.runtimes.memory_cap import step_bytes
from arriero.runtimes.step_memory import StepMemory
from arriero.runtimes.steps import logits_piece
from arriero.traits import PREFILL_PIECE, TRAITS

LOGIT_COPIES = 2  # of a piece's logits while they are measured
COMPUTED_IN = 0.5  # of what a step may compute in at most, logits aside


def parity_memory(
    used: Iterable[WeightSource], target: PlannedTarget, seen: ModelConfig, lengths: Sequence[int]
) -> int:
    """Estimate parity: cases of these `lengths`, their steps, the longest's cache, and the backend's copy of weights.

    A backend that does not map weights keeps a copy of what it packs to multiply by, neither of the embedding's table
    nor of experts that are exact, and of quantised matrices the packed form beside what it was packed from.
    """
    takes, text = TRAITS[target.backend].footprint, seen.text
    longest, most = max(lengths, default=0), min(PREFILL_PIECE, logits_piece(text.vocab_size))
    logits = 4 * min(longest, most) * text.vocab_size
    held = takes.runtime + kv_bytes(text, longest, CACHE_BYTES[target.kv_cache])
    held += _steps_memory(seen, lengths, most) if takes.keeps_steps else LOGIT_COPIES * logits
    if not takes.maps_weights:
        exact = target.is_exact
        held += sum(size * (1 if label in FLOATS else 2) for label, size in target.weights.items())
        for info in used:
            if info.name == EMBEDDING:
                held -= info.nbytes
            elif exact and len(info.shape) > 2:
                held -= 4 * math.prod(info.shape)
    return held


def _steps_memory(seen: ModelConfig, lengths: Sequence[int], most: int) -> int:
    """Bytes that are kept of the steps, of at most so many tokens, in which cases of these lengths are read.

    What a step gave is held until the next one has ended: two of the same size in turn have logits of their own.
    """
    text, spec = seen.text, model_spec(seen)
    width = 2 * max(text.expert_ffn if layer.moe else text.dense_ffn for layer in text.layers)
    fixed, logits = step_bytes(spec, width, 0), 4 * text.vocab_size
    token = step_bytes(spec, width, 1) - fixed
    kept, peak, before = dict[int, float](), 0.0, 0
    memory = StepMemory(token * PREFILL_PIECE, kept.clear)
    for length in lengths:
        for start in range(0, length, most):
            tokens = min(most, length - start)
            memory.before(tokens, tokens * (token + logits))
            needed = tokens * (COMPUTED_IN * token + logits * (2 if tokens == before else 1))
            kept[tokens] = max(kept.get(tokens, 0.0), needed)
            peak, before = max(peak, sum(kept.values())), tokens
    return fixed + int(peak)
