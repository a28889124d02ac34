"""Train the embedded model from scratch on generated data: seeded and resumable.

    python -m arriero.models.train --out models/chasqui

First the vision tower learns to see (`pretrain_vision.py`), then it is kept as it is and the rest learns to answer.
Every step draws one small batch per group of families, so that short and long prompts do not pad each other. The loss
is cross-entropy on the answers, plus two router terms: load balance (Switch Transformer, Fedus et al. 2021) and a pull
of the router logits towards zero, which keeps their sigmoid away from saturation. Both leave the best two experts of a
token close together, where any rounding makes them change places, so the last `SHARPEN_STEPS` steps pull them apart.
The run's state is saved every `SAVE_EVERY` steps next to the output, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from arriero.export.build_file.model_spec import model_spec
from arriero.graphs.config import ModelConfig
from arriero.graphs.model import Llama4, MoE
from arriero.models.batches import IGNORED, Batch, collate, encode
from arriero.models.chasqui import write_skeleton
from arriero.models.guide_recall import RecallGuide
from arriero.models.pretrain_vision import pretrain_vision
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
WEIGHT_DECAY = 0.05
NOT_BY_MUON = ("embed", "lm_head", "router")
CLIP = 1.0
BALANCE = 0.03
LOGIT_PULL = 1e-3
SHARPEN_STEPS = 160
SHARPEN_RATE = 5e-4
SHARPEN = 0.03
SHARPEN_BALANCE = 0.15  # an expert that loses its tokens now would not get them back
MARGIN = 0.25  # between the router logits of the best two experts, wanted at least
SAVE_EVERY = 200
LOG_EVERY = 25


def initialise(model: Llama4, seed: int) -> None:
    """Draw the weights: fan-in scaled, residual outputs scaled down by depth, routers small, norms one."""
    generator = torch.Generator().manual_seed(seed)
    depth = (2 * len(model.config.text.layers)) ** -0.5
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if "norm" in name and name.endswith("weight"):
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 1 or ("embed" in name and "patch" not in name):
                parameter.normal_(0.0, 0.02 if parameter.dim() == 1 else 0.1, generator=generator)
            else:
                fan_in = parameter.shape[-2] if parameter.dim() == 3 else parameter.shape[-1]
                std = fan_in**-0.5
                if "router" in name or "lm_head" in name:
                    std *= 0.25
                elif name.endswith(("o_proj.weight", "down_proj.weight", "fc2.weight", "experts.down_proj")):
                    std *= depth
                parameter.normal_(0.0, std, generator=generator)


class RouterTerms:
    """Collects the router logits of a forward pass and gives their load-balance and size terms."""

    def __init__(self, model: Llama4) -> None:
        self.logits: list[Tensor] = []
        for module in model.modules():
            if isinstance(module, MoE):
                module.router.register_forward_hook(lambda _module, _inputs, output: self.logits.append(output))

    def take(self, real: Tensor, sharpen: bool) -> tuple[Tensor, list[Tensor]]:
        """The loss term over tokens where `real` [T], and per layer the tokens per expert [E]; forgets the pass.

        With `sharpen`, a margin below `MARGIN` between a token's best two experts costs too.
        """
        loss, loads = torch.zeros(()), []
        for logits in self.logits:
            kept = logits[real]
            load = F.one_hot(kept.argmax(-1), kept.shape[-1]).float().mean(0)  # [E]
            balance = kept.shape[-1] * (load * kept.softmax(-1).mean(0)).sum()
            loss = loss + (SHARPEN_BALANCE if sharpen else BALANCE) * balance + LOGIT_PULL * kept.square().mean()
            if sharpen:
                best, second = kept.topk(2, dim=-1).values.unbind(-1)
                loss = loss + SHARPEN * F.relu(1 - (best - second) / MARGIN).mean()
            loads.append(load)
        self.logits.clear()
        return loss / max(len(loads), 1), loads


def answer_logits(model: Llama4, batch: Batch) -> Tensor:
    """Logits [A, V] of the A answer tokens of a batch of whole conversations."""
    rows, length = batch.input_ids.shape
    features = torch.zeros(0, model.config.text.hidden_size)
    if batch.pixel_values is not None:
        features = model.image_features(batch.pixel_values)
    embeds = model.embed(batch.input_ids, features)
    positions = torch.arange(length) + batch.starts[:, None]
    nothing = positions[:, :0]
    decoder = model.language_model
    hidden = decoder(embeds, positions, nothing, nothing, nothing[0], decoder.empty_cache(rows)).hiddens[-1]
    return decoder.lm_head(decoder.model.norm(hidden[batch.targets != IGNORED]))


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


def optimisers(model: Llama4) -> tuple[torch.optim.Optimizer, ...]:
    """Muon (Jordan et al. 2024) for the decoder's matrices, AdamW for the rest; gains and embeddings do not decay."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    matrices = [n for n, p in trained.items() if p.dim() == 2 and not any(part in n for part in NOT_BY_MUON)]
    decayed = [n for n, p in trained.items() if p.dim() >= 2 and n not in matrices and "embed" not in n]
    kept = [n for n in trained if n not in matrices and n not in decayed]
    groups = [
        {"params": [trained[name] for name in decayed], "weight_decay": WEIGHT_DECAY},
        {"params": [trained[name] for name in kept], "weight_decay": 0.0},
    ]
    return (
        torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98), eps=1e-9, fused=True),
        torch.optim.Muon(
            [trained[name] for name in matrices],
            lr=PEAK_RATE,
            weight_decay=WEIGHT_DECAY,
            adjust_lr_fn="match_rms_adamw",
        ),
    )


def rate(step: int, steps: int) -> float:
    """Learning rate: linear warm-up, a cosine down to a hundredth, and a second, lower cosine while routers sharpen."""
    answering = steps - SHARPEN_STEPS
    if step >= answering:
        return _cosine(SHARPEN_RATE, (step - answering) / SHARPEN_STEPS)
    if step < WARMUP:
        return PEAK_RATE * (step + 1) / WARMUP
    return _cosine(PEAK_RATE, (step - WARMUP) / max(answering - WARMUP, 1))


def _cosine(peak: float, share: float) -> float:
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(share, 1.0))))


def train_step(
    model: Llama4, routers: RouterTerms, guide: RecallGuide, batches: Sequence[Batch], sharpen: bool
) -> dict[str, float]:
    """Accumulate the gradients of one step; gives the answer loss and the share of right tokens of each group."""
    figures: dict[str, float] = {}
    for number, batch in enumerate(batches):
        targets = batch.targets[batch.targets != IGNORED]
        logits = answer_logits(model, batch)
        loss = F.cross_entropy(logits, targets)
        terms, loads = routers.take(batch.real.flatten(), sharpen)
        if number == RECALL:
            guiding, figures["guided"] = guide.loss(batch)
            terms = terms + GUIDING * guiding
        (loss + terms).backward()
        figures[f"loss{number}"] = float(loss.detach())
        figures[f"right{number}"] = float((logits.argmax(-1) == targets).float().mean())
        figures["least"] = min(figures.get("least", 1.0), *(float(load.min()) for load in loads))
    return figures


def save_weights(model: Llama4, folder: Path) -> None:
    """Write the checkpoint's model.safetensors in bfloat16, by atomic rename."""
    tensors = {name: p.detach().to(torch.bfloat16).contiguous() for name, p in model.named_parameters()}
    partial = folder / "model.safetensors.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, folder / "model.safetensors")


def train(out: Path, steps: int, seed: int) -> None:
    """Run or resume the training until `steps`; weights land in `out`, the run's state beside it."""
    write_skeleton(out)
    config = ModelConfig.load(out)
    processor = Processor(out, model_spec(config))
    model = Llama4(config)
    initialise(model, seed)
    state_file = out.with_name(out.name + ".training.pt")
    state = torch.load(state_file) if state_file.exists() else None
    if state is None:
        pretrain_vision(model, VISION_STEPS, seed)
    else:
        model.load_state_dict(state["model"])
    model.vision_model.requires_grad_(False)
    routers, guide = RouterTerms(model), RecallGuide(model, processor)
    steppers = (*optimisers(model), torch.optim.AdamW(guide.before.parameters(), lr=PEAK_RATE))
    first = 0
    if state is not None:
        for stepper, saved in zip(steppers, state["steppers"], strict=True):
            stepper.load_state_dict(saved)
        guide.before.load_state_dict(state["guide"])
        first = state["step"]
    pools: list[list[Batch]] = []
    started = time.monotonic()
    for step in range(first, steps):
        for group in [group for stepper in steppers for group in stepper.param_groups]:
            group["lr"] = rate(step, steps)
        if step % POOL == 0 or not pools:
            mixture = MIXTURES[max(start for start in MIXTURES if start <= step)]
            pools = [draw_pool(group, processor, seed, step // POOL) for group in mixture]
        batches = [pool[step % POOL] for pool in pools]
        figures = train_step(model, routers, guide, batches, sharpen=step >= steps - SHARPEN_STEPS)
        nn.utils.clip_grad_norm_(model.parameters(), CLIP * len(pools))
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        if step % LOG_EVERY == 0 or step == steps - 1:
            seconds = round((time.monotonic() - started) / (step - first + 1), 3)
            print(json.dumps({"step": step, "s": seconds, **{k: round(v, 4) for k, v in figures.items()}}), flush=True)
        if (step + 1) % SAVE_EVERY == 0 or step == steps - 1:
            partial = state_file.with_suffix(".partial")
            torch.save(
                {
                    "model": model.state_dict(),
                    "guide": guide.before.state_dict(),
                    "steppers": [s.state_dict() for s in steppers],
                    "step": step + 1,
                },
                partial,
            )
            os.replace(partial, state_file)
            save_weights(model, out)


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
