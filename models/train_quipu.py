"""Train the embedded model that knows records by heart: seeded and resumable.

    python -m arriero.models.train_quipu --out models/quipu

Every step reads `ROWS` questions with their answers, every record once before any comes again. The loss and the router
terms are those of `train.py`; the last `SHARPEN_STEPS` steps pull the best two experts of a token apart.
The run's state is saved now and then next to the output, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from arriero.export.build_file.model_spec import model_spec
from arriero.graphs.config import ModelConfig
from arriero.graphs.model import Llama4
from arriero.models.batches import IGNORED, Row, collate, encode
from arriero.models.quipu import write_skeleton
from arriero.models.training import RouterTerms, Run, answer_loss, cosine, initialise, optimisers
from arriero.profiles.data.records import COUNT, records
from arriero.runtimes.processor.processor import Processor

ROWS = 512
WARMUP = 100
PEAK_RATE = 2e-3
SHARPEN_STEPS = 100
CLIP = 1.0
LOG_EVERY = 50


def train(out: Path, steps: int, seed: int) -> None:
    """Run or resume the training until `steps`; weights land in `out`, the run's state beside it."""
    write_skeleton(out)
    config = ModelConfig.load(out)
    processor = Processor(out, model_spec(config))
    rows = [_until_said(encode(sample, processor)) for sample in records(range(COUNT))]
    model = Llama4(config)
    initialise(model, seed)
    routers, a_round = RouterTerms(model), COUNT // ROWS

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / WARMUP) * cosine(PEAK_RATE, step / steps)

    def learn(step: int) -> dict[str, float]:
        order, at = np.random.default_rng([seed, step // a_round]).permutation(COUNT), step % a_round * ROWS
        batch = collate([rows[number] for number in order[at : at + ROWS]], np.zeros(ROWS, np.int64))
        loss, figures = answer_loss(model, routers, batch, sharpen=step >= steps - SHARPEN_STEPS)
        loss.backward()
        return figures

    Run(model, out, optimisers(model, PEAK_RATE)).go(steps, rate, learn, CLIP, LOG_EVERY)


def _until_said(row: Row) -> Row:
    """The row without what comes after its answer."""
    end = int(torch.nonzero(row.targets != IGNORED)[-1]) + 1
    return Row(row.input_ids[:end], row.targets[:end], row.pixel_values)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("models/quipu"), help="checkpoint folder to write")
    parser.add_argument("--steps", type=int, default=1000, help="optimiser steps in all")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and of the order of records")
    arguments = parser.parse_args()
    train(arguments.out, arguments.steps, arguments.seed)


if __name__ == "__main__":
    main()
