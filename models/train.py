"""Train the embedded model from scratch on generated data: seeded and resumable.

    python -m arriero.models.train --out models/chasqui

First the vision tower learns to see (`pretrain_vision.py`), then it is kept as it is and the rest learns to answer.
Every step draws one small batch per group of families, so that short and long prompts do not pad each other. The loss
is cross-entropy on the answers, plus two router terms: load balance (Switch Transformer, Fedus et al. 2021) and a pull
of the router logits towards zero, which keeps their sigmoid away from saturation. Both leave the best two experts of a
token close together, where any rounding makes them change places, so the last `SHARPEN_STEPS` steps pull them apart.
The run's state is saved now and then next to the output, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from arriero.export.build_file.model_spec import model_spec
from arriero.graphs.config import ModelConfig
from arriero.graphs.model import Llama4
from arriero.models.batches import Batch, collate, encode
from arriero.models.chasqui import write_skeleton
from arriero.models.guide_recall import RecallGuide
from arriero.models.pretrain_vision import pretrain_vision
from arriero.models.training import (
    RouterTerms,
    Run,
    answer_loss,
    cosine,
    initialise,
    optimisers,
    state_file,
)
from arriero.profiles.data import make
from arriero.runtimes.processor.processor import Processor

# Samples per step of each family, by first step; families of one group share a batch. What is learned gives way to
# what is not yet: to arithmetic, at last to counting, description and several images.
Mixture = tuple[dict[str, int], ...]
MIXTURES: dict[int, Mixture] = {
    0: (
        {"arithmetic": 14, "sorting": 4},
        {"recall": 6},
        {"shape": 2, "colour": 2, "count": 5, "position": 3, "describe": 10},
        {"several": 7, "video": 3},
    ),
    800: (
        {"arithmetic": 24, "sorting": 5},
        {"recall": 6},
        {"shape": 1, "colour": 1, "count": 6, "position": 1, "describe": 12},
        {"several": 9, "video": 3},
    ),
    1500: (
        {"arithmetic": 8, "sorting": 5},
        {"recall": 4},
        {"shape": 1, "colour": 1, "count": 8, "position": 1, "describe": 16},
        {"several": 13, "video": 2},
    ),
}
SHIFTED = 0.75  # share of recall rows that start at a drawn position, so that chunk boundaries fall anywhere
GUIDING = 0.3
RECALL = 1  # the group that is guided
POOL = 16  # steps whose samples are drawn together, so that batches hold prompts of like length
VISION_STEPS = 2500
WARMUP = 100
PEAK_RATE = 2e-3
CLIP = 1.0
SHARPEN_STEPS = 160
SHARPEN_RATE = 5e-4
LOG_EVERY = 25


def draw_pool(group: dict[str, int], processor: Processor, seed: int, pool: int) -> list[Batch]:
    """The batches of one group for the steps of pool number `pool`, each of conversations of like length."""
    rng = np.random.default_rng([seed, pool])
    chunk = processor.spec.attention_chunk_size if "recall" in group else 1
    samples = [
        sample
        for family, count in group.items()
        for sample in make(family, count * POOL, seed * 1_000_003 + pool, "train")
    ]
    rows = sorted((encode(sample, processor) for sample in samples), key=lambda row: len(row.input_ids))
    size = sum(group.values())
    starts = np.where(rng.random(len(rows)) < SHIFTED, rng.integers(0, chunk, len(rows)), 0)
    batches = [slice(index * size, (index + 1) * size) for index in rng.permutation(POOL)]
    return [collate(rows[batch], starts[batch]) for batch in batches]


def rate(step: int, steps: int) -> float:
    """Learning rate: linear warm-up, a cosine down to a hundredth, and a second, lower cosine while routers sharpen."""
    answering = steps - SHARPEN_STEPS
    if step >= answering:
        return cosine(SHARPEN_RATE, (step - answering) / SHARPEN_STEPS)
    if step < WARMUP:
        return PEAK_RATE * (step + 1) / WARMUP
    return cosine(PEAK_RATE, (step - WARMUP) / max(answering - WARMUP, 1))


def train_step(
    model: Llama4, routers: RouterTerms, guide: RecallGuide, batches: Sequence[Batch], sharpen: bool
) -> dict[str, float]:
    """Accumulate the gradients of one step; gives the answer loss and the share of right tokens of each group."""
    figures: dict[str, float] = {}
    for number, batch in enumerate(batches):
        loss, found = answer_loss(model, routers, batch, sharpen)
        if number == RECALL:
            guiding, figures["guided"] = guide.loss(batch)
            loss = loss + GUIDING * guiding
        loss.backward()
        figures |= {f"loss{number}": found["loss"], f"right{number}": found["right"]}
        figures["least"] = min(figures.get("least", 1.0), found["least"])
    return figures


def train(out: Path, steps: int, seed: int) -> None:
    """Run or resume the training until `steps`; weights land in `out`, the run's state beside it."""
    write_skeleton(out)
    config = ModelConfig.load(out)
    processor = Processor(out, model_spec(config))
    model = Llama4(config)
    initialise(model, seed)
    if not state_file(out).exists():
        pretrain_vision(model, VISION_STEPS, seed)
    model.vision_model.requires_grad_(False)
    routers, guide = RouterTerms(model), RecallGuide(model, processor)
    steppers = (*optimisers(model, PEAK_RATE), torch.optim.AdamW(guide.before.parameters(), lr=PEAK_RATE))
    pools: list[list[Batch]] = []

    def learn(step: int) -> dict[str, float]:
        if step % POOL == 0 or not pools:
            mixture = MIXTURES[max(start for start in MIXTURES if start <= step)]
            pools[:] = [draw_pool(group, processor, seed, step // POOL) for group in mixture]
        batches = [pool[step % POOL] for pool in pools]
        return train_step(model, routers, guide, batches, sharpen=step >= steps - SHARPEN_STEPS)

    run = Run(model, out, steppers, {"guide": guide.before})
    run.go(steps, lambda step: rate(step, steps), learn, CLIP * len(MIXTURES[0]), LOG_EVERY)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("models/chasqui"), help="checkpoint folder to write")
    parser.add_argument("--steps", type=int, default=2560, help="optimiser steps in all")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and data")
    arguments = parser.parse_args()
    train(arguments.out, arguments.steps, arguments.seed)


if __name__ == "__main__":
    main()
