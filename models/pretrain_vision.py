"""First half of the training: teach the vision tower to see, before any text.

Every image token of a tile says, through three linear heads that are thrown away afterwards, which shape, which colour
and which place of the layout has its centre under that token. Labels on every token teach in minutes what answers alone
would teach in hours; the decoder then learns to read what the tower already says.
"""

from __future__ import annotations

import json
import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from arriero.graphs.model import Llama4
from arriero.models.chasqui import TILE
from arriero.profiles.data.scenes import COLOURS, PLACES, SHAPES, Thing, background, draw_things, pick_size, render

HEADS = {"shape": list(SHAPES), "colour": list(COLOURS), "place": list(PLACES)}
NOTHING = 0  # class of a token under which no centre lies
IMAGES = 64  # per step
PEAK_RATE = 1.5e-3
WARMUP = 100
LOG_EVERY = 100


def draw_batch(rng: np.random.Generator, grid: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Tiles f32 [n, 3, h, w] in -1..1 and per head the class of each image token int64 [n, grid*grid]."""
    tiles = np.empty((IMAGES, TILE, TILE, 3), np.uint8)
    labels = {name: np.zeros((IMAGES, grid * grid), np.int64) for name in HEADS}
    for number in range(IMAGES):
        things = draw_things(rng, int(rng.integers(1, 6))) if rng.random() < 0.75 else [wandering(rng)]
        image = Image.fromarray(render(things, background(rng), *pick_size(rng)))
        tiles[number] = np.asarray(image.resize((TILE, TILE), Image.Resampling.BILINEAR))
        for thing in things:
            token = int(thing.y * grid) * grid + int(thing.x * grid)
            for name, classes in HEADS.items():
                labels[name][number, token] = 1 + classes.index(getattr(thing, name))
    pixels = torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    return pixels.contiguous(), {name: torch.from_numpy(values) for name, values in labels.items()}


def wandering(rng: np.random.Generator) -> Thing:
    """A thing anywhere, as in the frames of a video."""
    shape, colour = str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS)))
    return Thing(shape, colour, rng.uniform(0.14, 0.86), rng.uniform(0.14, 0.86), rng.uniform(0.105, 0.15))


def pretrain_vision(model: Llama4, steps: int, seed: int) -> None:
    """Train the tower and the projector of `model` in place; the same seed gives the same weights."""
    vision = model.config.vision
    assert vision is not None
    grid = math.isqrt(vision.tokens_per_tile)
    torch.manual_seed(seed)
    heads = nn.ModuleDict({name: nn.Linear(model.config.text.hidden_size, 1 + len(HEADS[name])) for name in HEADS})
    parts = nn.ModuleList([model.vision_model, model.multi_modal_projector, heads])
    adam = torch.optim.AdamW(parts.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
    rng = np.random.default_rng([seed, 1])
    started = time.monotonic()
    for step in range(steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        adam.param_groups[0]["lr"] = PEAK_RATE * min((step + 1) / WARMUP, 0.02 + 0.98 * cosine)
        pixels, labels = draw_batch(rng, grid)
        features = model.image_features(pixels).unflatten(0, (IMAGES, -1))  # [n, tokens, H]
        logits = {name: head(features) for name, head in heads.items()}
        loss = torch.stack([F.cross_entropy(logits[n].flatten(0, 1), labels[n].flatten()) for n in HEADS]).sum()
        # Features are read by the decoder beside token embeddings, so they are kept at a like size.
        loss = loss + 0.01 * (features.square().mean() - 1.0).square()
        loss.backward()
        nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        if step % LOG_EVERY == 0 or step == steps - 1:
            seen = labels["shape"] != NOTHING
            right = {n: round(float((logits[n].argmax(-1) == labels[n])[seen].float().mean()), 3) for n in HEADS}
            progress = {"vision": step, "s": round((time.monotonic() - started) / (step + 1), 3)}
            print(json.dumps({**progress, "loss": round(float(loss.detach()), 4), **right}), flush=True)
