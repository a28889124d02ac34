"""The embedded checkpoint: loads unchanged in transformers, and knows its tasks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from arriero.export.proof.reference import TorchBackend
from arriero.export.samples.cases import draw_samples
from arriero.graphs.config import ModelConfig
from arriero.models.evaluate import SATURATED, count_experts, family_accuracy, router_scores
from arriero.profiles.data import FAMILIES
from arriero.runtimes.processor.processor import Processor
from arriero.runtimes.session import Session

CHASQUI = Path(__file__).parents[2] / "models" / "chasqui"
BAR = 0.90  # task accuracy per family; measured on many more samples in models/README.md


@pytest.fixture(scope="module")
def backend() -> TorchBackend:
    return TorchBackend(CHASQUI)


@pytest.fixture(scope="module")
def session(backend: TorchBackend) -> Session:
    return Session(backend, Processor(CHASQUI, backend.spec), batch=16)


def test_it_has_scouts_shape():
    text = ModelConfig.load(CHASQUI).text
    assert [(layer.rope, layer.chunked, layer.moe) for layer in text.layers] == [(True, True, True)] * 3 + [
        (False, False, True)
    ]
    assert (text.experts, text.experts_per_token, text.qk_norm, text.temperature_tuning) == (16, 1, True, True)
    assert text.kv_heads < text.heads


@torch.no_grad()
def test_transformers_loads_it_unchanged_and_agrees(session):
    transformers = pytest.importorskip("transformers")
    judge, loading = transformers.Llama4ForConditionalGeneration.from_pretrained(
        CHASQUI, dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for sample in draw_samples(("text", "image"), 20, 77, "held-out"):
        prompt = session.encode(sample.prompt, sample.images)
        pixels = None if prompt.pixel_values is None else torch.from_numpy(prompt.pixel_values)
        theirs = judge.eval()(input_ids=torch.from_numpy(prompt.input_ids)[None], pixel_values=pixels).logits.numpy()
        ours = session.logits(prompt.input_ids, prompt.pixel_values).logits
        # fp32 on both sides; the sums differ in order only
        assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max(), sample.family


def test_it_knows_every_family(session):
    found = family_accuracy(session, samples=40, seed=501)
    assert set(found) == set(FAMILIES)
    assert not {family: value for family, value in found.items() if value < BAR}


def test_every_expert_is_used_and_no_router_is_saturated(backend, session):
    calibration = draw_samples(("text", "image"), 200, 11, "train")
    for layer, counts in count_experts(session, calibration).items():
        assert min(counts) > 0, f"layer {layer}"
    for layer, scores in router_scores(backend, session, 60, 11).items():
        assert np.mean(scores > SATURATED) < 0.05, f"layer {layer}"
        assert np.median(scores) < 0.95, f"layer {layer}"
