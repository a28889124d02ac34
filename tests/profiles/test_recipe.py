"""Profiles as data: the shipped ones, and every mistake refused with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from arriero.errors import ArrieroError, Problems
from arriero.profiles.recipe import Exact, IntBlock, Profile, check_shapes, load_profile, shipped
from tests.toys import make_maverick_toy, make_scout_toy

LAYER = "language_model.model.layers.0"
MINIMAL = {"name": "p", "version": 1, "description": "d", "thresholds": {}}


def selector(match: str, **more: object) -> dict[str, object]:
    return {"match": match, "reason": "because", **more}


@pytest.mark.parametrize("toy", ["scout", "scout-text", "maverick"])
@pytest.mark.parametrize("name", ["fp32", "int8"])
def test_a_shipped_profile_decides_every_tensor_of_every_shape(tmp_path: Path, toy: str, name: str) -> None:
    from arriero.graphs.checkpoint import Checkpoint

    make = {
        "scout": make_scout_toy,
        "scout-text": lambda folder, seed: make_scout_toy(folder, seed, vision=False),
        "maverick": make_maverick_toy,
    }[toy]
    names = Checkpoint.open(make(tmp_path, 0)).tensors
    assigned = load_profile(name).assign(names)
    assert list(assigned) == list(names)
    quantized = {tensor for tensor, scheme in assigned.items() if isinstance(scheme, IntBlock)}
    if name == "fp32":
        assert not quantized
        return
    kept = ("router", "self_attn", "norm", "embed", "lm_head", "vision_model", "multi_modal_projector")
    assert quantized == {tensor for tensor in names if not any(word in tensor for word in kept)}
    assert all(scheme.accuracy_level == 4 for scheme in assigned.values() if isinstance(scheme, IntBlock))


def test_shipped_profiles_carry_their_name_and_thresholds() -> None:
    assert set(shipped()) >= {"fp32", "int8"}
    for name, path in shipped().items():
        assert load_profile(name).name == name
        assert load_profile(path) == load_profile(name)
    assert load_profile("fp32").thresholds == {
        "router_agreement": 1.0,
        "same_top_token": 1.0,
        "logits_max_abs_error": 1e-4,
    }
    assert load_profile("int8").thresholds == {"router_agreement": 0.99, "task_accuracy_drop": 0.01}


def test_keep_comes_before_rules_and_the_first_match_wins() -> None:
    scheme = {"kind": "int_block", "bits": 4, "block": 32, "accuracy_level": 0}
    eight = {**scheme, "bits": 8, "accuracy_level": 4}
    profile = Profile.model_validate(
        {
            **MINIMAL,
            "keep": [selector("a.b")],
            "rules": [selector("re:a\\..*", scheme=eight), selector("re:.*", scheme=scheme)],
        }
    )
    assigned = profile.assign(["a.b", "a.c", "d"])
    assert assigned == {
        "a.b": Exact(),
        "a.c": IntBlock(kind="int_block", bits=8, block=32, accuracy_level=4),
        "d": IntBlock(kind="int_block", bits=4, block=32, accuracy_level=0),
    }


def test_idle_selectors_and_undecided_tensors_are_listed_together() -> None:
    profile = Profile.model_validate(
        {**MINIMAL, "keep": [selector("nothing"), selector("gone", optional=True), selector("re:a.*")]}
    )
    with pytest.raises(Problems) as caught:
        profile.assign(["abc", "xyz"])
    text = str(caught.value)
    assert len(caught.value.problems) == 2
    assert "xyz: no selector of the profile decides this tensor" in text
    assert "`nothing` matches no tensor" in text


def test_a_pattern_must_take_the_whole_name() -> None:
    profile = Profile.model_validate({**MINIMAL, "keep": [selector("re:layer")]})
    with pytest.raises(Problems):
        profile.assign(["layer.weight"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: [", ["not readable as YAML"]),
        ("name: p\nversion: 0\ndescription: d\nthresholds: {}\n", ["version"]),
        ("name: p\nversion: 1\ndescription: d\nthresholds: {}\nkep: []\n", ["kep"]),
        ("name: p\nversion: 1\ndescription: d\nthresholds: {}\nkeep: [{match: x}]\n", ["keep.0.reason"]),
        ("name: p\nversion: 1\ndescription: d\nthresholds: {}\nkeep: [{match: x, reason: ' '}]\n", ["keep.0.reason"]),
        (
            "name: p\nversion: 1\ndescription: d\nthresholds: {}\nkeep: [{match: 're:(', reason: x}]\n",
            ["keep.0.match", "not a regular expression"],
        ),
        (
            "name: p\nversion: 1\ndescription: d\nthresholds: {}\n"
            "rules: [{match: x, reason: y, scheme: {kind: int_block, bits: 3, block: 33, accuracy_level: 4}}]\n",
            ["bits", "block"],
        ),
    ],
)
def test_a_wrong_file_is_refused_with_its_place(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(ArrieroError) as caught:
        load_profile(path)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_an_unknown_profile_names_the_shipped_ones() -> None:
    with pytest.raises(ArrieroError, match=r"one of fp32, int4.*, int8, or the path"):
        load_profile("int9")


GPTQ = {"kind": "int_block", "bits": 4, "block": 32, "accuracy_level": 0, "rounding": "gptq"}
CALIBRATION = {"damping": 0.03, "minimum_tokens": 8, "below": "nearest", "reason": "because"}


def calibrated(**changes: object) -> dict[str, object]:
    rules = [selector(f"{LAYER}.self_attn.q_proj.weight", scheme=GPTQ)]
    return {**MINIMAL, "rules": rules, "calibration": CALIBRATION, "thresholds": {"kl_over_naive": 0.5}, **changes}


def test_a_profile_that_calibrates_says_how_and_what_it_must_beat() -> None:
    assert Profile.model_validate(calibrated()).calibration is not None
    with pytest.raises(ValueError, match="needs a `calibration` section"):
        Profile.model_validate(calibrated(calibration=None))
    for thresholds in ({}, {"kl_over_naive": 1.0}):
        with pytest.raises(ValueError, match="must beat its naive form"):
            Profile.model_validate(calibrated(thresholds=thresholds))
    with pytest.raises(ValueError, match="the `calibration` section would do nothing"):
        Profile.model_validate(calibrated(rules=[]))


def test_the_naive_form_differs_in_nothing_but_rounding() -> None:
    profile = Profile.model_validate(calibrated())
    naive = profile.naive()
    name = f"{LAYER}.self_attn.q_proj.weight"
    scheme, plain = profile.assign([name])[name], naive.assign([name])[name]
    assert isinstance(scheme, IntBlock)
    assert plain == scheme.model_copy(update={"rounding": "nearest"})
    assert naive.calibration is None
    assert naive.naive() == naive


@pytest.mark.parametrize("name", [name for name in shipped() if "int4" in name])
def test_shipped_int4_profiles_calibrate_every_matrix_and_leave_nothing_else(name: str) -> None:
    profile = load_profile(name)
    assert profile.thresholds["kl_over_naive"] == 0.5
    assert profile.thresholds["task_accuracy_drop"] == 0.02
    tensors = [f"{LAYER}.self_attn.k_proj.weight", f"{LAYER}.feed_forward.experts.down_proj"]
    others = ["language_model.model.norm.weight", "language_model.model.embed_tokens.weight"]
    schemes = profile.assign([*tensors, *others])
    found = [schemes[one] for one in tensors]
    assert all(isinstance(scheme, IntBlock) and scheme.rounding == "gptq" for scheme in found)
    assert all(isinstance(schemes[one], Exact) for one in others)


def test_what_cannot_be_done_is_refused_before_anything_runs() -> None:
    rules = [selector("re:.*", scheme={**GPTQ, "block": 64})]
    profile = Profile.model_validate(calibrated(rules=rules))
    shapes = {
        f"{LAYER}.self_attn.q_proj.weight": (64, 96),
        f"{LAYER}.feed_forward.experts.down_proj": (4, 32, 64),
        "language_model.lm_head.weight": (160, 64),
        "language_model.model.norm.weight": (64,),
    }
    with pytest.raises(Problems) as caught:
        check_shapes(profile, shapes)
    told = str(caught.value)
    assert f"{LAYER}.self_attn.q_proj.weight: 96 input features do not divide into blocks of 64" in told
    assert f"{LAYER}.feed_forward.experts.down_proj: 32 input features do not divide into blocks of 64" in told
    assert "language_model.lm_head.weight: calibration sees no inputs of this tensor" in told
    assert "language_model.model.norm.weight: a vector has no blocks" in told
    check_shapes(Profile.model_validate(calibrated()), {f"{LAYER}.self_attn.q_proj.weight": (64, 96)})
