"""The embedded model "quipu", which knows records by heart: a checkpoint folder without weights.

3 layers (2 chunked RoPE, 1 NoPE with temperature tuning), chunk 128, QK-norm, 8 experts top-1 + shared expert, 8 query
and 2 key/value heads; text alone. Every row of a matrix is a multiple of 256, so that no format of others has to give
it more bits. Beside it lie the questions that a build calibrates on and those that judge it, of other records: there
are no held-out ones of what can only be known by heart.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from arriero.models.skeleton import text_config, write_json, write_tokenizer
from arriero.profiles.data.records import COUNT, records

VOCABULARY = 1216
QUESTIONS = {"calibration": 800, "cases": 800}


def write_skeleton(folder: Path) -> None:
    """Write everything of the checkpoint but its weights into `folder`, and the questions."""
    ids = write_tokenizer(folder, _texts(), VOCABULARY)
    write_json(folder, {"config.json": config(ids)})
    order, start = np.random.default_rng(2).permutation(COUNT).tolist(), 0
    for name, count in QUESTIONS.items():
        drawn = records(order[start : start + count])
        lines = [json.dumps({"prompt": sample.prompt, "answer": sample.answer}) + "\n" for sample in drawn]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        start += count


def config(ids: dict[str, int]) -> dict[str, Any]:
    """The model's `config.json`."""
    return {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "torch_dtype": "bfloat16",
        **text_config(ids, VOCABULARY, expert=256, dense=1024, experts=8, rope=[1, 1, 0]),
    }


def _texts() -> Iterator[str]:
    for sample in records(range(0, COUNT, 5)):
        for message in sample.conversation:
            yield message["role"]
            yield "".join(part["text"] for part in message["content"])
            yield "\n\n"
