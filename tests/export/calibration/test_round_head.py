"""The head, rounded by what it reads: closer logits than to nearest, whole whatever its slices, and only once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arriero.export.calibration import round_head
from arriero.export.calibration.calibrate import Calibration
from arriero.export.calibration.estimate import head_memory
from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.names import HEAD
from arriero.profiles.quantize import dequantize
from arriero.profiles.quantized_weights import QuantizedWeights
from arriero.profiles.recipe import Profile, check_shapes
from arriero.profiles.schemes import IntBlock
from arriero.profiles.stored_values import nearest
from tests.export.calibration.test_choice import profile as choosing
from tests.export.proof.test_walk_layers import TOYS, walk_over
from tests.export.proof.test_walk_layers import profile as layers_alone
from tests.toys import load_reference

SCHEME = IntBlock(kind="int_block", bits=4, block=16, accuracy_level=0, rounding="gptq")


def with_head(plain: Profile) -> Profile:
    """`plain` with the head rounded by gptq."""
    entries = plain.model_dump(mode="json")
    entries["keep"] = [{"match": r"re:.*(router|norm|embed_tokens).*", "reason": "r"}]
    rule = {"match": HEAD, "scheme": SCHEME.model_dump(mode="json"), "reason": "r"}
    return Profile.model_validate({**entries, "rules": [rule, *entries["rules"]]})


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return TOYS["scout"](tmp_path / "toy")  # type: ignore[no-any-return]


def calibrate(toy: Path, stage: Path, mine: Profile, steps: list[str] | None = None) -> QuantizedWeights:
    checkpoint = Checkpoint.open(toy)
    check_shapes(mine, {name: info.shape for name, info in checkpoint.tensors.items()})

    def watch(step: str, *_: Any) -> None:
        if steps is not None:
            steps.append(step)

    Calibration(walk_over(load_reference(toy), stage), checkpoint, {"p": mine}, stage, watch).run()
    return QuantizedWeights(stage / "p")


def test_its_logits_are_nearer_than_those_of_the_nearest_rounding(toy: Path, tmp_path: Path) -> None:
    made = calibrate(toy, tmp_path / "stage", with_head(layers_alone()))
    walk = walk_over(load_reference(toy), tmp_path / "walk")
    walk.embed()
    for layer in range(4):
        for _ in walk.steps(layer):
            pass
    read, exact = walk.normed(np.load(walk.hidden_file(4))), Checkpoint.open(toy).read_float32(HEAD)
    errors = [
        float(np.sum((read @ (values - exact).T) ** 2))
        for values in (dequantize(made.read(HEAD, SCHEME)), dequantize(nearest(exact, SCHEME, name=HEAD)))
    ]
    assert 0 < errors[0] < 0.7 * errors[1]
    (note,) = (note for note in made.notes() if note.tensor == HEAD)
    assert (note.rounding, note.expert, note.tokens) == ("gptq", None, walk.tokens)
    assert note.gain == pytest.approx(errors[0] / errors[1], rel=0.02)


def test_slices_make_the_same_head(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = calibrate(toy, tmp_path / "whole", with_head(layers_alone())).read(HEAD, SCHEME)
    monkeypatch.setattr(round_head, "HEAD_SLICE", 48 * 64)  # 48 rows, which do not divide the vocabulary
    sliced = calibrate(toy, tmp_path / "sliced", with_head(layers_alone())).read(HEAD, SCHEME)
    assert len(whole.scales) % 48
    np.testing.assert_array_equal(sliced.packed, whole.packed)
    np.testing.assert_array_equal(sliced.scales, whole.scales)


def test_a_killed_calibration_rounds_the_head_without_the_layers_and_not_again(toy: Path, tmp_path: Path) -> None:
    stage, steps = tmp_path / "stage", list[str]()
    checkpoint, mine = Checkpoint.open(toy), with_head(layers_alone())

    def killed(step: str, *_: Any) -> None:
        if step == "calibrate: head":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Calibration(walk_over(load_reference(toy), stage), checkpoint, {"p": mine}, stage, killed).run()
    made = calibrate(toy, stage, mine, steps)
    assert set(steps) == {"calibrate: head"}
    assert HEAD in made
    again = list[str]()
    calibrate(toy, stage, mine, again)
    assert again == []


def test_a_profile_that_chooses_keeps_what_it_calibrates_without_a_choice(toy: Path, tmp_path: Path) -> None:
    made = calibrate(toy, tmp_path / "stage", with_head(choosing()))
    assert made.read(HEAD, SCHEME).scales.dtype == np.float32
    assert HEAD in {note.tensor for note in made.notes()}


def test_its_memory_is_planned_where_a_profile_rounds_it(toy: Path) -> None:
    used = [*Checkpoint.open(toy).tensors.values()]
    assert head_memory([layers_alone()], used) == 0
    (head,) = (info for info in used if info.name == HEAD)
    assert head_memory([layers_alone(), with_head(layers_alone())], used) > 4 * np.prod(head.shape)
