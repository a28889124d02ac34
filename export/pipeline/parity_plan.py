"""What measuring a bundle's parity holds at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from arriero.export.build_file.model_spec import model_spec
from arriero.export.calibration.estimate import Size, tower_activations
from arriero.export.pipeline.cache_plan import CACHE_BYTES, kv_bytes
from arriero.export.pipeline.planned import FLOATS, PlannedTarget
from arriero.graphs.config import ModelConfig
from arriero.graphs.names import EMBEDDING
from arriero.graphs.sources.weight_source import WeightSource
from arriero.runtimes.backend import TILES_AT_ONCE
from arriero.runtimes.memory_cap import captured_bytes, given_bytes, pooled_bytes, step_bytes
from arriero.runtimes.proof.shared_steps import share_steps, tokens_together, usual_tokens
from arriero.runtimes.step_memory import StepMemory
from arriero.traits import PREFILL_PIECE, TRAITS

LOGIT_COPIES = 2  # of a piece's logits while they are measured


def parity_memory(
    used: Iterable[WeightSource],
    target: PlannedTarget,
    seen: ModelConfig,
    sizes: Sequence[Size],
    memory: tuple[int | None, int | None],
) -> int:
    """Estimate parity: cases of these `sizes`, their steps and caches, and the backend's copy of weights.

    `memory` are the bytes that the build may use and those that are free, None where there is no limit.
    A backend that does not map weights keeps a copy of what it packs to multiply by, neither of the embedding's table
    nor of experts that are exact, and of quantised matrices the packed form beside what it was packed from.
    """
    takes, text = TRAITS[target.backend].footprint, seen.text
    lengths, tiles = [size[0] for size in sizes], max((size[1] for size in sizes), default=0)
    longest, most = max(lengths, default=0), usual_tokens(model_spec(seen))
    held = takes.runtime + takes.layer * seen.layers
    if seen.vision is not None:
        held += tower_activations(seen.vision, min(tiles, TILES_AT_ONCE))
    if takes.keeps_steps:
        together = tokens_together(model_spec(seen), target.weights_bytes, *memory)
        shared = list(share_steps(lengths, int, 1, min(together, text.chunk)))
        held += max((kv_bytes(text, len(own) * max(own), CACHE_BYTES[target.kv_cache]) for own in shared), default=0)
        held += _steps_memory(seen, shared, most, takes.computes_in)
    else:
        held += kv_bytes(text, longest, CACHE_BYTES[target.kv_cache])
        token, _ = _step_memory(seen)
        outputs = LOGIT_COPIES * 4 * text.vocab_size + captured_bytes(model_spec(seen))
        held += int(min(longest, most) * (takes.computes_in * token + outputs))
    if not takes.maps_weights:
        exact = target.is_exact
        held += sum(size * (1 if label in FLOATS else 2) for label, size in target.weights.items())
        for info in used:
            if info.name == EMBEDDING:
                held -= info.nbytes
            elif exact and len(info.shape) > 2:
                held -= 4 * math.prod(info.shape)
    return held


def _step_memory(seen: ModelConfig) -> tuple[int, int]:
    """The most bytes that a step computes in for each of its tokens, logits aside, and besides."""
    fixed = step_bytes(model_spec(seen), _widest(seen), 0)
    return step_bytes(model_spec(seen), _widest(seen), 1) - fixed, fixed


def _widest(seen: ModelConfig) -> int:
    """The most features that a matrix of a layer gives."""
    text = seen.text
    return max(
        max(text.expert_ffn if layer.moe else text.dense_ffn for layer in text.layers),
        text.heads * text.head_dim,
        text.hidden_size,
    )


def _steps_memory(seen: ModelConfig, shared: Iterable[Sequence[int]], most: int, computes_in: float) -> int:
    """Bytes that are kept of the steps in which cases of the `shared` lengths are read, one alone `most` at a time.

    What a step gave is held until the next one has ended: two of the same size in turn have outputs of their own.
    """
    spec, widest = model_spec(seen), _widest(seen)
    token, fixed = _step_memory(seen)
    outputs = given_bytes(spec)
    kept, peak, before = dict[int, float](), 0.0, 0
    memory = StepMemory(pooled_bytes(spec, widest, PREFILL_PIECE, 0, False), kept.clear)
    for lengths in shared:
        whole = sum(lengths)
        piece = most if len(lengths) == 1 else whole
        for start in range(0, whole, piece):
            tokens = min(piece, whole - start)
            memory.before(tokens, pooled_bytes(spec, widest, tokens, tokens, True))
            needed = tokens * (computes_in * token + outputs * (2 if tokens == before else 1))
            kept[tokens] = max(kept.get(tokens, 0.0), needed)
            peak, before = max(peak, sum(kept.values())), tokens
    return fixed + int(peak)
