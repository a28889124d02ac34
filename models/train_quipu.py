"""Train the embedded model that knows records by heart: seeded and resumable.

    python -m arriero.models.train_quipu --out models/quipu

Every step reads `ROWS` questions with their answers, every record once before any comes again. The loss and the router
terms are those of `train.py`; the last `SHARPEN_STEPS` steps pull the best two experts of a token apart.
The run's state is saved every `SAVE_EVERY` steps next to the output, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from arriero.export.build_file.model_spec import model_spec
from arriero.graphs.config import ModelConfig
from arriero.graphs.model import Llama4
from arriero.models.batches import IGNORED, Batch, Row, collate, encode
from arriero.models.quipu import write_skeleton
from arriero.models.training import (
    RouterTerms,
    answer_logits,
    cosine,
    initialise,
    load_state,
    optimisers,
    save_state,
)
from arriero.profiles.data.records import COUNT, records
from arriero.runtimes.processor.processor import Processor

ROWS = 512
WARMUP = 100
PEAK_RATE = 2e-3
SHARPEN_STEPS = 100
CLIP = 1.0
SAVE_EVERY = 200
LOG_EVERY = 50


def train_step(model: Llama4, routers: RouterTerms, batch: Batch, sharpen: bool) -> dict[str, float]:
    """Accumulate the gradients of one step; gives the answer loss and the share of right tokens."""
    targets = batch.targets[batch.targets != IGNORED]
    logits = answer_logits(model, batch)
    loss = F.cross_entropy(logits, targets)
    terms, loads = routers.take(batch.real.flatten(), sharpen)
    (loss + terms).backward()
    return {
        "loss": float(loss.detach()),
        "right": float((logits.argmax(-1) == targets).float().mean()),
        "least": min(float(load.min()) for load in loads),
    }


def train(out: Path, steps: int, seed: int) -> None:
    """Run or resume the training until `steps`; weights land in `out`, the run's state beside it."""
    write_skeleton(out)
    config = ModelConfig.load(out)
    processor = Processor(out, model_spec(config))
    rows = [_until_said(encode(sample, processor)) for sample in records(range(COUNT))]
    model = Llama4(config)
    initialise(model, seed)
    routers, steppers, first = RouterTerms(model), optimisers(model, PEAK_RATE), 0
    if (state := load_state(out)) is not None:
        model.load_state_dict(state["model"])
        for stepper, saved in zip(steppers, state["steppers"], strict=True):
            stepper.load_state_dict(saved)
        first = state["step"]
    a_round, started = COUNT // ROWS, time.monotonic()
    for step in range(first, steps):
        warm = min(1.0, (step + 1) / WARMUP)
        for group in [group for stepper in steppers for group in stepper.param_groups]:
            group["lr"] = warm * cosine(PEAK_RATE, step / steps)
        order, at = np.random.default_rng([seed, step // a_round]).permutation(COUNT), step % a_round * ROWS
        batch = collate([rows[number] for number in order[at : at + ROWS]], np.zeros(ROWS, np.int64))
        figures = train_step(model, routers, batch, sharpen=step >= steps - SHARPEN_STEPS)
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        if step % LOG_EVERY == 0 or step == steps - 1:
            seconds = round((time.monotonic() - started) / (step - first + 1), 3)
            print(json.dumps({"step": step, "s": seconds, **{k: round(v, 4) for k, v in figures.items()}}), flush=True)
        if (step + 1) % SAVE_EVERY == 0 or step == steps - 1:
            save_state(model, {"steppers": [stepper.state_dict() for stepper in steppers], "step": step + 1}, out)


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
