"""What a build's reference record depends on, how its answers are made, and what it takes.

Legend: C cases, T tokens of all cases, V vocabulary, H hidden, k experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from arriero.export.build_file.schema import GENERATED_BYTES, BuildConfig
from arriero.export.calibration import estimate
from arriero.export.machine.versions import installed_versions
from arriero.export.pipeline.sources import source_hash
from arriero.export.proof.decoded_memory import VOCABULARY, logit_groups
from arriero.graphs.config import ModelConfig, TextConfig
from arriero.graphs.sources.open_layout import weight_bytes
from arriero.graphs.sources.weight_source import WeightSource
from arriero.runtimes.proof.logits import DRAWN, HEAD, WHOLE_VOCABULARY
from arriero.runtimes.proof.sketch import BUCKETS
from arriero.thresholds import AnswerMode
from arriero.traits import SHARED_PACKAGES

LAYOUTS = "graphs/sources"  # which are imported by name, so that only their folder shows what reads a checkpoint
RECORDS = ("export/proof/write_record.py", "export/samples/cases.py", LAYOUTS)  # the sources that the stage begins in
LOGITS_BESIDE = 60 << 20  # what else is held while logits are made and sorted: libraries, blocks in float64
ENTRY_BYTES = 4 << 10  # of `record.json` for one case


def answer_mode(build: BuildConfig) -> AnswerMode:
    """How the reference answers: as the build file says, else by the checkpoint's size."""
    if build.parity.answers is not None:
        return build.parity.answers
    size = weight_bytes(build.model)
    return "generated" if size <= GENERATED_BYTES else "forced"


def record_inputs(build: BuildConfig, content_hash: str, cases: Any) -> dict[str, Any]:
    """What the stage `reference` depends on; `cases` is what its set depends on."""
    return {
        "checkpoint": content_hash,
        "modalities": list(build.modalities),
        "cases": cases,
        "answers": answer_mode(build),
        "tools": installed_versions(SHARED_PACKAGES),
        "source": source_hash(*RECORDS),
    }


def record_disk(config: ModelConfig, sizes: Sequence[estimate.Size]) -> int:
    """The most bytes that the stage's folder takes: while the walk goes through a layer, or with all logits."""
    text, tokens = config.text, sum(size[0] for size in sizes)
    record = record_bytes(config, sizes)
    walking = record - _logits_bytes(text, tokens) + estimate.walk_disk(config, sizes, calibrates=False)
    return max(walking, record + 4 * text.hidden_size * tokens)


def record_bytes(config: ModelConfig, sizes: Sequence[estimate.Size]) -> int:
    """Bytes of the record of cases of these sizes: tokens and image tiles. A picture counts as its tiles, unpacked."""
    text, tokens = config.text, sum(size[0] for size in sizes)
    per_token = 8 + 4 * len(text.moe_layers) * (text.experts_per_token + 1)
    sketches = 8 * (BUCKETS + 1) * (len(text.layers) + 4)
    side = 0 if config.vision is None else config.vision.image_size
    pictures = 3 * side**2 * sum(size[1] for size in sizes)
    return _logits_bytes(text, tokens) + tokens * per_token + len(sizes) * (sketches + ENTRY_BYTES) + pictures


def _logits_bytes(text: TextConfig, tokens: int) -> int:
    return tokens * (4 * text.vocab_size if text.vocab_size <= WHOLE_VOCABULARY else 8 * (HEAD + DRAWN) + 16)


def record_memory(
    config: ModelConfig, used: Sequence[WeightSource], sizes: Sequence[estimate.Size], answers: AnswerMode
) -> int:
    """Bytes that making the record holds: a layer and a case's step, or logits with what is sorted of a case's."""
    text, lengths = config.text, [size[0] for size in sizes]
    largest = 4 * text.vocab_size * max(lengths, default=0)
    groups = logit_groups(lengths, text)
    together = 4 * text.vocab_size * max((sum(lengths[number] for number in group) for group in groups), default=0)
    rows = min(VOCABULARY, text.vocab_size)  # of the head at a time
    head = 2 * 4 * rows * text.hidden_size + together * rows // text.vocab_size
    logits = together + max(head, largest)
    walked = estimate.calibration_memory(config, used, sizes, second=False, whole=answers == "generated")
    return max(walked, estimate.process_memory(config) + LOGITS_BESIDE + logits)
