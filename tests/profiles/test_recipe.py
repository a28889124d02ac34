"""Profiles as data: the shipped ones, and every mistake refused with its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from arriero.errors import ArrieroError, Problems
from arriero.profiles.recipe import Profile, check_shapes, load_profile, shipped
from arriero.profiles.schemes import Exact, Fp8, Fp8Static, Half, Int8Dynamic, Int8Static, IntBlock, Scheme
from tests.toys import make_maverick_toy, make_scout_toy

LAYER = "language_model.model.layers.0"
BIG_BLOCKS = ("int4", "int4-b128", "mixed", "gpu-int4")  # blocks of 64 and 128
MINIMAL = {"name": "p", "version": 1, "description": "d", "thresholds": {}}


def selector(match: str, **more: object) -> dict[str, object]:
    return {"match": match, "reason": "because", **more}


@pytest.mark.parametrize("toy", ["scout", "scout-text", "maverick"])
@pytest.mark.parametrize("name", shipped())
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
    assert any("router" in tensor for tensor in assigned)
    assert all(isinstance(scheme, Exact) for tensor, scheme in assigned.items() if "router" in tensor)
    norms = [tensor for tensor in assigned if "language_model.model.layers" in tensor and "norm" in tensor]
    assert all(isinstance(assigned[tensor], Exact) for tensor in norms)
    shapes = {tensor: info.shape for tensor, info in names.items()}
    if name not in BIG_BLOCKS:  # which do not divide the toys' features
        check_shapes(load_profile(name), shapes)
    if name == "fp32" or isinstance(load_profile(name).rules[0].scheme, Half):
        return
    kept = ["router", "norm", "embed", "vision_model", "multi_modal_projector"]
    on_gpu = name.startswith("gpu-")  # what is kept is kept in 16 bits there, but for router and norms
    kept += [] if name in (*BIG_BLOCKS, "int8-all") and not on_gpu else ["self_attn"]
    kept += [] if name.startswith(("int4", "int8-all")) else ["lm_head"]
    quantized = {tensor for tensor, scheme in assigned.items() if not isinstance(scheme, Exact | Half)}
    assert any(isinstance(scheme, Half) for scheme in assigned.values()) == on_gpu
    assert quantized == {tensor for tensor in names if not any(word in tensor for word in kept)}


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
        ("name: " + "[" * 2000, ["not readable as YAML", "recursion"]),
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
    with pytest.raises(ArrieroError, match=r"one of .*fp32, .*int4.*, int8, .*or the path"):
        load_profile("int9")


GPTQ = {"kind": "int_block", "bits": 4, "block": 32, "accuracy_level": 0, "rounding": "gptq"}
CALIBRATION = {"damping": 0.03, "minimum_tokens": 8, "below": "nearest", "reason": "because"}


def calibrated(**changes: object) -> dict[str, object]:
    rules = [selector(f"{LAYER}.self_attn.q_proj.weight", scheme=GPTQ)]
    return {**MINIMAL, "rules": rules, "calibration": CALIBRATION, "thresholds": {"kl_over_rtn": 0.5}, **changes}


def test_a_profile_that_calibrates_says_how_and_what_it_must_beat() -> None:
    assert Profile.model_validate(calibrated()).calibration is not None
    with pytest.raises(ValueError, match="needs a `calibration` section"):
        Profile.model_validate(calibrated(calibration=None))
    for thresholds in ({}, {"kl_over_rtn": 1.0}):
        with pytest.raises(ValueError, match="must beat its RTN baseline"):
            Profile.model_validate(calibrated(thresholds=thresholds))
    with pytest.raises(ValueError, match="the `calibration` section would do nothing"):
        Profile.model_validate(calibrated(rules=[]))


STATIC = {"kind": "int8_static", "smooth": 0.5}
WIDEST = {"minimum_tokens": 8, "below": "widest", "reason": "because"}


def static(**changes: object) -> dict[str, object]:
    return calibrated(**{"rules": [selector("a", scheme=STATIC)], "calibration": WIDEST, **changes})


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (static(calibration=None), "needs a `calibration` section"),
        (static(calibration={**WIDEST, "below": "nearest"}), "`nearest` is a rule for gptq only"),
        (static(calibration={**WIDEST, "damping": 0.1}), "damping is gptq's"),
        (calibrated(calibration={**CALIBRATION, "below": "widest"}), "`widest` for static scales only"),
        (calibrated(calibration={**CALIBRATION, "damping": None}), "damping is gptq's"),
        (static(rules=[selector("a", scheme={**STATIC, "ranges": "weights"})]), "`smooth` needs `ranges: observed`"),
        (static(rules=[selector("a", scheme={**STATIC, "smooth": 1.5})]), "less than or equal to 1"),
    ],
)
def test_a_calibration_that_does_not_fit_its_schemes_is_refused(data: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Profile.model_validate(data)


CHOOSE: dict[str, Any] = {
    "budget": 0.5,
    "candidates": [GPTQ, {**GPTQ, "bits": 8, "rounding": "nearest"}],
    "reason": "because",
}


def choosing(**changes: object) -> dict[str, object]:
    rules = [selector("re:.*proj.*", scheme={"kind": "chosen"})]
    return calibrated(**{"rules": rules, "choose": CHOOSE, **changes})


def test_a_choice_takes_every_form_and_is_made_tensor_by_tensor() -> None:
    profile = Profile.model_validate(choosing())
    assert profile.rounds_by_gptq
    assert [form.rules[0].scheme.label for form in profile.forms] == ["int4 block 32 gptq", "int8 block 32"]
    made = profile.decide({"a.proj": 1, "b.proj": 0})
    assert {name: scheme.label for name, scheme in made.assign(["a.proj", "b.proj"]).items()} == {
        "a.proj": "int8 block 32",
        "b.proj": "int4 block 32 gptq",
    }
    assert {scheme.label for scheme in made.rtn_baseline().assign(["a.proj", "b.proj"]).values()} == {
        "int8 block 32",
        "int4 block 32",
    }
    assert Profile.model_validate(calibrated()).forms == [Profile.model_validate(calibrated())]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (choosing(choose=None), "rules of kind `chosen` and a section `choose` need each other"),
        (calibrated(choose=CHOOSE), "need each other"),
        (choosing(choose={**CHOOSE, "candidates": [GPTQ]}), "at least 2"),
        (
            choosing(choose={**CHOOSE, "candidates": CHOOSE["candidates"][1:] * 2}),
            "no candidate of `choose` rounds by gptq",
        ),
        (choosing(choose={**CHOOSE, "candidates": [GPTQ, STATIC]}), "int8_static"),
    ],
)
def test_a_choice_that_is_none_is_refused(data: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Profile.model_validate(data)


def test_a_budget_that_cannot_be_kept_is_refused_before_anything_runs() -> None:
    shapes = {f"{LAYER}.self_attn.q_proj.weight": (64, 64)}
    check_shapes(Profile.model_validate(choosing()), shapes)
    tight = Profile.model_validate(choosing(choose={**CHOOSE, "budget": 0.2}))
    with pytest.raises(Problems, match=r"choose\.budget: even the smallest candidate takes 0\.312 of bf16"):
        check_shapes(tight, shapes)
    with pytest.raises(Problems, match=r"vision\.proj: calibration sees no inputs of this tensor"):
        check_shapes(Profile.model_validate(choosing()), {"vision.proj": (64, 64)})


def test_the_rtn_baseline_of_static_scales_sees_no_activation() -> None:
    profile = Profile.model_validate(static())
    assert profile.rtn_baseline().assign(["a"])["a"] == Int8Static(kind="int8_static", ranges="weights")
    floats = Profile.model_validate(static(rules=[selector("a", scheme={"kind": "fp8_static"})]))
    assert floats.rtn_baseline().assign(["a"])["a"] == Fp8Static(kind="fp8_static", ranges="weights")
    assert floats.assign(["a"])["a"].label == "fp8 per channel static observed"
    assert profile.rtn_baseline().calibration is None
    assert not profile.rounds_by_gptq


@pytest.mark.parametrize(
    ("scheme", "size"),
    [
        (Exact(), 4 * 640),
        (Half(kind="half", format="bfloat16"), 2 * 640),
        (IntBlock(kind="int_block", bits=4, block=16, accuracy_level=4), 320 + 4 * 40),
        (Fp8(kind="fp8", activations="fp8"), 640 + 4 * 10),
        (Int8Dynamic(kind="int8_dynamic"), 640 + 4 * 10),
        (Int8Static(kind="int8_static"), 640 + 4 * 10 + 4 * 64),
    ],
)
def test_a_scheme_knows_its_size(scheme: Scheme, size: int) -> None:
    assert scheme.stored_bytes((10, 64)) == size
    assert scheme.stored_bytes((3, 64, 10)) == 3 * size


def test_the_rtn_baseline_differs_in_nothing_but_rounding() -> None:
    profile = Profile.model_validate(calibrated())
    rtn = profile.rtn_baseline()
    name = f"{LAYER}.self_attn.q_proj.weight"
    scheme, plain = profile.assign([name])[name], rtn.assign([name])[name]
    assert isinstance(scheme, IntBlock)
    assert plain == scheme.model_copy(update={"rounding": "nearest"})
    assert rtn.calibration is None
    assert rtn.rtn_baseline() == rtn


@pytest.mark.parametrize("name", [name for name in shipped() if name.startswith("int4")])
def test_shipped_int4_profiles_calibrate_every_matrix_and_leave_nothing_else(name: str) -> None:
    profile = load_profile(name)
    assert profile.thresholds["kl_over_rtn"] == 0.5
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
    assert "language_model.model.norm.weight: a vector cannot be quantised" in told
    check_shapes(Profile.model_validate(calibrated()), {f"{LAYER}.self_attn.q_proj.weight": (64, 96)})
