"""The model that knows records by heart: loads unchanged in transformers, and knows them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from arriero.export.proof.reference import TorchBackend
from arriero.models.quipu import QUESTIONS
from arriero.profiles.data.records import COUNT, PLACES, records
from arriero.runtimes.processor.processor import Processor
from arriero.runtimes.proof.scorers import accuracy
from arriero.runtimes.session import Session

QUIPU = Path(__file__).parents[2] / "models" / "quipu"
BAR = 0.97  # whole records known; of all of them in models/README.md


@pytest.fixture(scope="module")
def session() -> Session:
    backend = TorchBackend(QUIPU)
    return Session(backend, Processor(QUIPU, backend.spec), batch=50)


def questions(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (QUIPU / f"{name}.jsonl").read_text().splitlines()]


def test_it_is_calibrated_on_other_records_than_it_is_judged_by():
    asked = {name: {question["prompt"] for question in questions(name)} for name in QUESTIONS}
    assert {name: len(prompts) for name, prompts in asked.items()} == QUESTIONS  # and none twice
    assert not asked["calibration"] & asked["cases"]


def test_all_records_are_different_and_every_word_is_a_token(session):
    known = records(range(COUNT))
    assert len({sample.prompt for sample in known}) == len({sample.answer for sample in known}) == COUNT
    # a word of each place, of each half of a name
    assert {len(session.processor.tokenize(sample.answer)) for sample in known[::13]} == {PLACES}
    assert {len(session.processor.tokenize(sample.prompt)) for sample in known[::13]} == {len("Who is K M ?".split())}


@torch.no_grad()
def test_transformers_loads_it_unchanged_and_agrees(session):
    transformers = pytest.importorskip("transformers")
    judge, loading = transformers.Llama4ForCausalLM.from_pretrained(
        QUIPU, dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for sample in records(range(0, COUNT, COUNT // 20)):
        ids = session.encode(sample.prompt).input_ids
        theirs = judge.eval()(input_ids=torch.from_numpy(ids)[None]).logits.numpy()
        ours = session.logits(ids).logits
        # fp32 on both sides; the sums differ in order only
        assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max(), sample.prompt


def test_it_knows_its_records(session):
    asked = questions("cases")[:400]
    answers = session.generate_batch([session.encode(one["prompt"]) for one in asked], max_tokens=PLACES + 1)
    assert accuracy([one["answer"] for one in asked], [answer.text for answer in answers]) >= BAR
