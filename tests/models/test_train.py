"""The trainers: run through, write a checkpoint, and go on from their saved state."""

from __future__ import annotations

import json

import torch

from arriero.export.proof.reference import TorchBackend
from arriero.models import train as trainer
from arriero.models import train_quipu
from arriero.models.train import train


def test_a_short_run_writes_a_checkpoint_and_resumes(tmp_path, monkeypatch, capsys):
    for name, value in {"VISION_STEPS": 1, "LOG_EVERY": 1, "POOL": 2, "SHARPEN_STEPS": 1}.items():
        monkeypatch.setattr(trainer, name, value)
    monkeypatch.setattr("arriero.models.training.SAVE_EVERY", 1)
    monkeypatch.setattr("arriero.models.pretrain_vision.IMAGES", 4)
    out = tmp_path / "model"
    train(out, 1, seed=3)
    first = TorchBackend(out).model.language_model.model.layers[0].feed_forward.router.weight.clone()
    train(out, 2, seed=3)
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["step"] for line in told if "step" in line] == [0, 1]  # the second run goes on at step 1
    assert sum("vision" in line for line in told) == 1  # and does not teach the tower again
    assert all(0 <= line["guided"] <= 1 for line in told if "step" in line)
    assert not torch.equal(first, TorchBackend(out).model.language_model.model.layers[0].feed_forward.router.weight)


def test_a_short_run_over_records_writes_a_checkpoint_and_resumes(tmp_path, monkeypatch, capsys):
    for name, value in {"COUNT": 8, "ROWS": 4, "WARMUP": 1, "LOG_EVERY": 1}.items():
        monkeypatch.setattr(train_quipu, name, value)
    monkeypatch.setattr("arriero.models.training.SAVE_EVERY", 1)
    out = tmp_path / "model"
    train_quipu.train(out, 1, seed=3)
    first = TorchBackend(out).model.language_model.model.layers[0].feed_forward.router.weight.clone()
    train_quipu.train(out, 3, seed=3)
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["step"] for line in told] == [0, 1, 2]  # the second run goes on at step 1, into another round
    assert told[-1]["loss"] < told[0]["loss"]
    assert not torch.equal(first, TorchBackend(out).model.language_model.model.layers[0].feed_forward.router.weight)
