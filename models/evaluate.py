"""Judge a checkpoint or a bundle on the held-out families: task accuracy, expert coverage, router saturation.

python -m arriero.models.evaluate models/chasqui --samples 200
python -m arriero.models.evaluate bundles/portable-int8 --samples 200
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from arriero.export.proof.reference import TorchBackend
from arriero.export.samples.cases import draw_samples
from arriero.graphs.model import MoE
from arriero.profiles.data import FAMILIES, Sample, make
from arriero.runtimes.api import load
from arriero.runtimes.processor.processor import Processor
from arriero.runtimes.proof.metrics import accuracy_interval
from arriero.runtimes.proof.scorers import accuracy
from arriero.runtimes.session import Session

ROWS = 16  # sequences decoded together
ANSWER_TOKENS = 48
SATURATED = 0.99  # a router score above this no longer tells input from output scaling


def family_accuracy(session: Session, samples: int, seed: int) -> dict[str, float]:
    """Task accuracy per family on `samples` held-out samples each."""
    result = {}
    for family in FAMILIES:
        drawn = make(family, samples, seed)
        prompts = [session.encode(sample.prompt, sample.images) for sample in drawn]
        answers = session.generate_batch(prompts, max_tokens=ANSWER_TOKENS)
        result[family] = accuracy([sample.answer for sample in drawn], [answer.text for answer in answers])
    return result


def count_experts(session: Session, samples: Sequence[Sample]) -> dict[int, np.ndarray]:
    """Per MoE layer, tokens per expert int64 [E] over the prompts of `samples`."""
    counts: dict[int, np.ndarray] = {}
    for sample in samples:
        prompt = session.encode(sample.prompt, sample.images)
        for layer, ids in session.logits(prompt.input_ids, prompt.pixel_values, captures=True).expert_ids.items():
            counts[layer] = counts.get(layer, 0) + np.bincount(ids.ravel(), minlength=session.spec.num_local_experts)
    return counts


def router_scores(backend: TorchBackend, session: Session, samples: int, seed: int) -> dict[int, np.ndarray]:
    """Per MoE layer, the router scores of the chosen experts on the calibration split, one per token."""
    kept: dict[int, list[np.ndarray]] = {}
    hooks = []
    for index, layer in enumerate(backend.model.language_model.model.layers):
        if isinstance(layer.feed_forward, MoE):

            def note(_module: Any, _inputs: Any, logits: Tensor, index: int = index) -> None:
                kept.setdefault(index, []).append(logits.amax(-1).sigmoid().numpy())

            hooks.append(layer.feed_forward.router.register_forward_hook(note))
    for sample in draw_samples(("text", "image"), samples, seed, "train"):
        prompt = session.encode(sample.prompt, sample.images)
        session.logits(prompt.input_ids, prompt.pixel_values)
    for hook in hooks:
        hook.remove()
    return {index: np.concatenate(values) for index, values in kept.items()}


def main() -> None:
    """Parse the command line, measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a checkpoint folder, or a bundle")
    parser.add_argument("--samples", type=int, default=200, help="held-out samples per family")
    parser.add_argument("--seed", type=int, default=101, help="seed of the held-out samples")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {}
    if (arguments.model / "manifest.json").exists():
        session = load(arguments.model)
    else:
        backend = TorchBackend(arguments.model)
        session = Session(backend, Processor(arguments.model, backend.spec), batch=ROWS)
        calibration = draw_samples(("text", "image"), 200, arguments.seed + 1, "train")
        coverage = count_experts(session, calibration)
        figures["least tokens of an expert"] = {layer: int(min(counts)) for layer, counts in coverage.items()}
        scores = router_scores(backend, session, 100, arguments.seed + 1)
        figures["router score"] = {
            layer: {"median": round(float(np.median(s)), 3), "saturated": round(float((s > SATURATED).mean()), 4)}
            for layer, s in scores.items()
        }
    accuracies = family_accuracy(session, arguments.samples, arguments.seed)
    count = arguments.samples
    figures["accuracy"] = {
        family: "{:.3f} ({:.3f} to {:.3f})".format(value, *accuracy_interval(round(value * count), count))
        for family, value in accuracies.items()
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
