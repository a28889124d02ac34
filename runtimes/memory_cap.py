"""How the memory that a session may take is divided: what every token reads, caches, a step, and slots for experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from arriero.errors import ArrieroError
from arriero.runtimes.backend import MemoryCap, ModelSpec
from arriero.sizes import human_bytes
from arriero.traits import PREFILL_PIECE

# What Python, the libraries and their threads may come to hold after a bundle is opened.
MARGIN = 48 << 20
STEP_FIXED = 16 << 20  # bytes of a step, whatever its size: workspaces of every thread
STEP_SHARE = 8  # a larger piece of a prompt may take one part in so many of the experts' memory


@dataclass(frozen=True)
class RecordSize:
    """How many experts a layer has, and the bytes of one's record."""

    experts: int
    nbytes: int


@dataclass(frozen=True)
class MemoryShare:
    """The experts that each layer may hold, and the tokens of a prompt that are read at once."""

    slots: tuple[int, ...]
    piece: int


def share_memory(
    cap: MemoryCap,
    held: int,
    core: int,
    layers: Sequence[RecordSize],
    spec: ModelSpec,
    step: Callable[[int], int],
    item_bytes: int,
) -> MemoryShare:
    """Divide what `cap` leaves beside the bytes `held` by the process and those of the `core`, read by every token.

    `step(tokens)` are the bytes that a step of so many computes in, `item_bytes` those of a number in the caches. A
    prompt is read in larger pieces than elsewhere where that takes little of the experts' memory, since each piece
    reads the experts that it needs. Raises `ArrieroError` with the smallest cap that would do.
    """
    fixed = held + MARGIN + core + cap.batch * cache_bytes(spec, cap.context, item_bytes)
    least = sum(layer.nbytes for layer in layers)
    room = cap.nbytes - fixed - step(PREFILL_PIECE)
    if room < least:
        needed = -(-(cap.nbytes - room + least) >> 20) << 20
        raise ArrieroError(
            f"a memory of {human_bytes(cap.nbytes)} is too small for the bundle",
            expected=f"at least {human_bytes(needed)}: {human_bytes(core)} of weights that every token reads, "
            f"{human_bytes(fixed - held - MARGIN - core)} of keys and values, {human_bytes(least)} for one expert of "
            "each layer, the rest for the process and its steps",
            remedy=f"Give it {-(-needed >> 20)}MiB or more, or a smaller `context` or `batch`, or build it with "
            "a narrower `kv_cache`",
        )
    piece = PREFILL_PIECE
    if room < sum(layer.experts * layer.nbytes for layer in layers):
        while 2 * piece <= min(spec.attention_chunk_size, cap.context) and (
            step(2 * piece) - step(PREFILL_PIECE) <= (room - least) // STEP_SHARE
        ):
            piece *= 2
    return MemoryShare(_slots(room - (step(piece) - step(PREFILL_PIECE)), layers), piece)


def _slots(room: int, layers: Sequence[RecordSize]) -> tuple[int, ...]:
    """As many slots in every layer as `room` has, then one more in the first of them."""
    even = room // max(1, sum(layer.nbytes for layer in layers))
    slots = [min(even, layer.experts) for layer in layers]
    room -= sum(count * layer.nbytes for count, layer in zip(slots, layers, strict=True))
    for number, layer in enumerate(layers):
        if slots[number] < layer.experts and layer.nbytes <= room:
            slots[number] += 1
            room -= layer.nbytes
    return tuple(slots)


def step_bytes(spec: ModelSpec, width: int, tokens: int) -> int:
    """What a step of so many tokens computes in, at most, the widest of its layers being of `width` features."""
    heads = (spec.num_attention_heads + 2 * spec.num_key_value_heads) * spec.head_dim
    rows = 12 * spec.hidden_size + 8 * width + 3 * heads
    return 4 * (tokens * rows + 4 * spec.vocab_size) + STEP_FIXED


def captured_bytes(spec: ModelSpec) -> int:
    """What a step that captures for proofs gives of each token besides logits: the hidden state after each layer."""
    return 4 * spec.hidden_size * len(spec.layers)


def given_bytes(spec: ModelSpec) -> int:
    """What a step that captures for proofs gives of each token: logits, and hidden states."""
    return 4 * spec.vocab_size + captured_bytes(spec)


def pooled_bytes(spec: ModelSpec, width: int, tokens: int, logits: int, captures: bool) -> int:
    """What a pool that keeps the memory of steps comes to keep of those with so many tokens and rows of logits.

    What a step gives is there twice: the first is held until the next step has ended.
    """
    computed = step_bytes(spec, width, tokens) - step_bytes(spec, width, 0)
    captured = tokens * captured_bytes(spec) if captures else 0
    return computed + 2 * (captured + 4 * spec.vocab_size * logits)


def cache_bytes(spec: ModelSpec, tokens: int, item_bytes: int) -> int:
    """Bytes of the keys and values of one sequence of `tokens`; a chunked layer holds at most its chunk."""
    slots = sum(
        min(tokens, spec.attention_chunk_size) if layer.attention == "chunked" else tokens for layer in spec.layers
    )
    return 2 * item_bytes * spec.num_key_value_heads * spec.head_dim * slots
