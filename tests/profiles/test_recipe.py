"""Profiles as data: the shipped ones, and every mistake refused with its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from arriero.errors import ArrieroError, Problems
from arriero.profiles.groups import GROUPS, group_of
from arriero.profiles.recipe import Profile, check_shapes, load_profile, shipped
from arriero.profiles.schemes import Exact, Fp8, Fp8Static, Half, Int8Dynamic, Int8Static, IntBlock, Scheme
from tests.toys import make_maverick_toy, make_scout_toy

LAYER = "language_model.model.layers.0"
FAST = ("int4-nl-fast", "int2.5-head4", "int2.5-fast")
# Blocks of 64 and 128.
BIG_BLOCKS = ("int4", "int4-fine", "int4-nl", "int4-b128", "int3", "int2.5", *FAST, "mixed", "gpu-int4")
START = "name: p\nversion: 1\ndescription: d\nthresholds: {}\n"
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
    profile = load_profile(name).fitted({}, names)  # nothing of a toy is quantised
    assigned = profile.assign(names)
    assert list(assigned) == list(names)
    assert any("router" in tensor for tensor in assigned)
    assert all(isinstance(scheme, Exact) for tensor, scheme in assigned.items() if "router" in tensor)
    norms = [tensor for tensor in assigned if "language_model.model.layers" in tensor and "norm" in tensor]
    assert all(isinstance(assigned[tensor], Exact) for tensor in norms)
    shapes = {tensor: info.shape for tensor, info in names.items()}
    if name not in BIG_BLOCKS:  # which do not divide the toys' features
        check_shapes(profile, shapes)
    if name in ("fp32", "as-stored") or isinstance(profile.rules[0].scheme, Half):
        return
    kept = ["router", "norm", "embed", "multi_modal_projector"]
    on_gpu = name.startswith("gpu-")  # what is kept is kept in 16 bits there, but for router and norms
    kept += [] if name in (*BIG_BLOCKS, "int8-all", "int4-experts") and not on_gpu else ["self_attn"]
    kept += [] if name.startswith(("int4", "int3", "int2", "int8-all")) else ["lm_head", "vision_model"]
    quantized = {tensor for tensor, scheme in assigned.items() if not isinstance(scheme, Exact | Half)}
    assert any(isinstance(scheme, Half) for scheme in assigned.values()) == on_gpu
    others = {tensor for tensor in names if group_of(tensor) != "vision"}
    assert quantized == {tensor for tensor in others if not any(word in tensor for word in kept)}


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
        {
            **MINIMAL,
            "keep": [
                selector("nothing.weight"),
                selector("gone.weight", optional=True),
                selector("re:a.*"),
                selector("experts"),
            ],
        }
    )
    with pytest.raises(Problems) as caught:
        profile.assign(["abc", "xyz"])
    text = str(caught.value)
    assert len(caught.value.problems) == 2
    assert "xyz: no selector of the profile decides this tensor" in text
    assert "`nothing.weight` matches no tensor" in text


KEPT = {"router": "exact", "norms": "exact", "embeddings": "exact", "vision": "exact", "projector": "exact"}
EIGHT = {"vision_layers": "int8 block 32", "head": "int8 block 32"}
ALL_KEPT = {**KEPT, "vision_layers": "exact"}
EXACT = {**ALL_KEPT, "attention": "exact", "head": "exact"}
ON_GPU = {**dict.fromkeys(EXACT, "f16"), "router": "exact", "norms": "exact"}
INT4 = {"experts": "int4 block 64 gptq"}
NL4 = {"experts": "nl4 block 128 gptq"}
NL3 = {"experts": "nl3 block 64 gptq"}
EXPERTS4 = {"experts": "nl4 block 32 gptq"}
NL2 = {"experts": "nl2 block 64 gptq"}  # gate and up
NEAREST = Path(__file__).parents[2] / "benchmarks" / "int4-nearest.yaml"


def everywhere(label: str, *groups: str) -> dict[str, str]:
    return dict.fromkeys(groups or ("experts", "shared_expert", "mlp"), label)


GPTQ8 = {**everywhere("int8 block 32 gptq", *GROUPS), **KEPT, **EIGHT}  # but for what a profile has in fewer


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("fp32", everywhere("exact", *GROUPS)),
        ("bf16", {**everywhere("bf16", *GROUPS), "router": "exact", "norms": "exact"}),
        ("fp16", {**everywhere("f16", *GROUPS), "router": "exact", "norms": "exact"}),
        ("fp8", {**EXACT, **everywhere("fp8 per channel")}),
        ("int8", {**EXACT, **everywhere("int8 block 32")}),
        ("int8-all", {**everywhere("int8 block 32", *GROUPS), **KEPT}),
        ("int8-dynamic", {**EXACT, **everywhere("int8 per channel dynamic")}),
        ("int8-static", {**EXACT, **everywhere("int8 per channel static observed smooth 0.95")}),
        ("as-stored", {**everywhere("as stored", *GROUPS), **ALL_KEPT}),
        ("mixed", {**everywhere("chosen", *GROUPS), **ALL_KEPT, "head": "exact"}),
        ("int4", {**everywhere("int4 block 32 gptq", *GROUPS), **KEPT, **INT4, **EIGHT}),
        ("int4-experts", {**GPTQ8, **EXPERTS4}),
        ("int4-fine", {**GPTQ8, **NL4}),
        ("int4-nl", {**GPTQ8, **NL4}),
        ("int3", {**GPTQ8, **NL3}),
        ("int2.5", {**GPTQ8, **NL2}),
        ("int2.5-head4", {**GPTQ8, **NL2, "head": "nl4 block 32 gptq"}),
        ("int2.5-fast", {**GPTQ8, **NL2, "head": "nl4 block 32 gptq"}),
        ("int4-nl-fast", {**GPTQ8, **NL4, "head": "nl4 block 32 gptq"}),
        ("int4-b128", {**everywhere("int4 block 128 gptq", *GROUPS), **KEPT, **EIGHT}),
        ("gpu-fp8", {**ON_GPU, **everywhere("fp8 per channel static observed")}),
        ("gpu-int8", {**ON_GPU, **everywhere("int8 per channel static observed smooth 0.95")}),
        ("gpu-int4", {**ON_GPU, **everywhere("int4 block 128 gptq")}),
        (NEAREST, {**everywhere("int4 block 32", *GROUPS), **ALL_KEPT, "head": "int8 block 32"}),
    ],
)
def test_a_profile_stores_each_group_so(name: str | Path, stored: dict[str, str]) -> None:
    one_of_each = {
        "experts": f"{LAYER}.feed_forward.experts.gate_up_proj",
        "shared_expert": f"{LAYER}.feed_forward.shared_expert.up_proj.weight",
        "mlp": f"{LAYER}.feed_forward.down_proj.weight",
        "attention": f"{LAYER}.self_attn.o_proj.weight",
        "router": f"{LAYER}.feed_forward.router.weight",
        "norms": "language_model.model.norm.weight",
        "embeddings": "language_model.model.embed_tokens.weight",
        "head": "language_model.lm_head.weight",
        "vision_layers": "vision_model.model.layers.0.mlp.fc1.weight",
        "vision": "vision_model.class_embedding",
        "projector": "multi_modal_projector.linear_1.weight",
    }
    assigned = load_profile(name).assign(one_of_each.values())
    assert {group: assigned[tensor].label for group, tensor in one_of_each.items()} == stored


@pytest.mark.parametrize("name", ["int4-experts", "int4-fine", "int4-nl", *FAST])
def test_what_is_timed_on_random_weights_is_the_shipped_profile_to_nearest(name: str) -> None:
    layers = [f"language_model.model.layers.{number}" for number in (0, 1)]
    matrices = ["self_attn.k_proj.weight", "self_attn.o_proj.weight", "feed_forward.router.weight"]
    matrices += ["feed_forward.shared_expert.up_proj.weight", "feed_forward.down_proj.weight"]
    matrices += ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj", "input_layernorm.weight"]
    tensors = [f"{layer}.{matrix}" for layer in layers for matrix in matrices]
    tensors += ["language_model.model.embed_tokens.weight", "language_model.lm_head.weight"]
    timed = load_profile(NEAREST.with_name(f"{name}-nearest.yaml"))
    assert timed.assign(tensors) == load_profile(name).rtn_baseline().assign(tensors)


def test_int4_nl_has_eight_bits_for_the_first_layer_and_for_keys_and_values_but_for_experts() -> None:
    layers = [f"language_model.model.layers.{number}" for number in (0, 1, 10, 20)]
    matrices = ["self_attn.q_proj.weight", "self_attn.v_proj.weight", "feed_forward.down_proj.weight"]
    matrices += ["feed_forward.shared_expert.down_proj.weight", "feed_forward.experts.down_proj"]
    names = [f"{layer}.{matrix}" for layer in layers for matrix in matrices]
    assigned = load_profile("int4-nl").assign([*names, "language_model.lm_head.weight"])
    middle = [assigned[f"{layers[1]}.{matrix}"].label for matrix in matrices]
    assert middle == ["nl4 block 32 gptq", "int8 block 32 gptq", *2 * ["nl4 block 32 gptq"], "nl4 block 128 gptq"]
    eight = {name for name in names if assigned[name].label == "int8 block 32 gptq"}
    first = {name for name in names if ".layers.0." in name and ".experts." not in name}
    assert eight == first | {name for name in names if "v_proj" in name}


def test_int4_fine_has_finer_activations_in_the_first_layer_and_before_every_down_projection() -> None:
    layers = [f"language_model.model.layers.{number}" for number in (0, 1, 10, 20)]
    matrices = ["self_attn.q_proj.weight", "self_attn.o_proj.weight", "feed_forward.gate_proj.weight"]
    matrices += ["feed_forward.shared_expert.up_proj.weight", "feed_forward.experts.down_proj"]
    fine = ["feed_forward.down_proj.weight", "feed_forward.shared_expert.down_proj.weight"]
    names = [f"{layer}.{matrix}" for layer in layers for matrix in (*matrices, *fine)]
    assigned = load_profile("int4-fine").assign([*names, "language_model.lm_head.weight"])
    middle = [assigned[f"{layers[1]}.{matrix}"].label for matrix in matrices]
    assert middle == [*2 * ["int8 block 32 gptq"], *2 * ["nl4 block 32 gptq"], "nl4 block 128 gptq"]
    two_steps = {name for name in names if assigned[name].codes == 2}
    assert two_steps == {
        name for name in names if "experts." not in name and (".layers.0." in name or name.endswith("down_proj.weight"))
    }
    assert {assigned[name].label for name in two_steps} == {"int8 block 32 gptq"}


def test_every_shipped_profile_is_in_the_table_and_short() -> None:
    (mark,) = test_a_profile_stores_each_group_so.pytestmark
    assert {name for name, _ in mark.args[1]} == {*shipped(), NEAREST}
    assert all(len(path.read_text().splitlines()) <= 32 for path in (*shipped().values(), NEAREST))


def test_a_group_may_be_empty_and_brings_its_own_reason() -> None:
    profile = Profile.model_validate({**MINIMAL, "keep": [{"match": ["router", "head"]}, selector("re:.*norm.*")]})
    assert profile.assign(["a.norm"]) == {"a.norm": Exact()}
    router, head, _ = profile.selectors
    assert (router.match, head.match) == ("router", "head")
    assert "which expert runs" in router.reason
    assert "logits" in head.reason


def test_a_pattern_must_take_the_whole_name() -> None:
    profile = Profile.model_validate({**MINIMAL, "keep": [selector("re:layer")]})
    with pytest.raises(Problems):
        profile.assign(["layer.weight"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: [", ["p.yaml:1: is not YAML"]),
        ("name: " + "[" * 2000, ["p.yaml:1: nests too deep"]),
        ("- a", ["p.yaml:1: is not a mapping at its top; expected `key: value` lines. Start from a shipped one"]),
        ("name: p\nname: q\n", ["p.yaml:2: name: is there twice, first on line 1"]),
        (START.replace("version: 1", "version: 0"), ["p.yaml:2: version: 0 is not valid; expected at least 1"]),
        (START.replace("version: 1", "version: '1'"), ["p.yaml:2: version: '1' is not valid; expected a whole number"]),
        (START.replace("name: p", "name:"), ["p.yaml:1: name: has no value; expected text"]),
        (START + "kep: []\n", ["p.yaml:5: kep: unknown key; expected one of name, version", "Did you mean 'keep'?"]),
        (START + "keep: [{match: x.y}]\n", ["p.yaml:5: keep[0]: has no reason to keep x.y"]),
        (START + "keep:\n- {match: [router, experts]}\n", ["p.yaml:6: keep[0]: has no reason to keep experts"]),
        (
            START + "keep: [{match: x.y, reason: ' '}]\n",
            ["p.yaml:5: keep[0].reason: ' ' is not valid; expected some"],
        ),
        (
            START + "keep:\n  - match: [router, 're:(']\n    reason: x\n",
            ["p.yaml:6: keep[0].match: `re:(` is not a regular expression"],
        ),
        (
            START + "keep: [{match: expert, reason: x}]\n",
            ["p.yaml:5: keep[0].match: `expert` is no group of tensors; expected one of experts", "mean 'experts'?"],
        ),
        (
            START + "keep: [{match: router, optional: yes}]\n",
            ["keep[0].optional: 'yes' is not valid; expected true"],
        ),
        (
            START + "rules:\n- match: x.y\n  reason: y\n  scheme: {kind: int_block, bits: 5, block: 33}\n",
            [
                "p.yaml:8: rules[0].scheme.bits: 5 is not valid; expected 2, 3, 4 or 8",
                "p.yaml:8: rules[0].scheme.block: 33 is not valid; expected 16, 32, 64, 128 or 256",
                "p.yaml:8: rules[0].scheme.accuracy_level: is missing",
            ],
        ),
        (
            START + "rules:\n- match: x.y\n  reason: y\n  scheme:\n    kind: int_blok\n",
            ["p.yaml:8: rules[0].scheme: 'int_blok' is no kind of scheme", "Did you mean 'int_block'?"],
        ),
        (
            START + "rules: [{match: x.y, reason: y, scheme: {}}]\n",
            ["rules[0].scheme: has no `kind`; expected one of exact, half, int_block, fp8, fp8_static, int8_dynamic"],
        ),
        (
            START + "rules: [{match: x.y, reason: y, scheme: {kind: half, formt: float16}}]\n",
            ["p.yaml:5: rules[0].scheme.formt: unknown key; expected one of kind, format. Did you mean 'format'?"],
        ),
        (
            START + "rules: [{match: x.y, reason: y, scheme: {kind: int8_static, ranges: weights, smooth: 0.5}}]\n",
            ["p.yaml:5: rules[0].scheme: `smooth` needs `ranges: observed`"],
        ),
        (
            START + "rules: [{match: x.y, reason: y, scheme: {kind: chosen}}]\n",
            ["p.yaml:1: rules of kind `chosen` and a section `choose` need each other."],
        ),
        (
            START.replace(" {}", "\n  rooter_agreement: 0.9\n  same_top_token.recall: 1\n  router_agreement: high"),
            [
                "p.yaml:5: thresholds.rooter_agreement: no such parity metric. Did you mean 'router_agreement'?",
                "p.yaml:6: thresholds.same_top_token.recall: no such parity metric. Only task_accuracy_reference, ",
                "p.yaml:7: thresholds.router_agreement: 'high' is not valid; expected a number",
            ],
        ),
    ],
)
def test_a_wrong_file_is_refused_with_its_place(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(ArrieroError) as caught:
        load_profile(path)
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert "pydantic" not in text


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
    return calibrated(**{"rules": [selector("a.b", scheme=STATIC)], "calibration": WIDEST, **changes})


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (static(calibration=None), "needs a `calibration` section"),
        (static(calibration={**WIDEST, "below": "nearest"}), "`nearest` is a rule for gptq only"),
        (static(calibration={**WIDEST, "damping": 0.1}), "damping is gptq's"),
        (calibrated(calibration={**CALIBRATION, "below": "widest"}), "`widest` for static scales only"),
        (calibrated(calibration={**CALIBRATION, "damping": None}), "damping is gptq's"),
        (static(rules=[selector("a.b", scheme={**STATIC, "ranges": "weights"})]), "`smooth` needs `ranges: observed`"),
        (static(rules=[selector("a.b", scheme={**STATIC, "smooth": 1.5})]), "less than or equal to 1"),
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
    assert profile.rtn_baseline().assign(["a.b"])["a.b"] == Int8Static(kind="int8_static", ranges="weights")
    floats = Profile.model_validate(static(rules=[selector("a.b", scheme={"kind": "fp8_static"})]))
    assert floats.rtn_baseline().assign(["a.b"])["a.b"] == Fp8Static(kind="fp8_static", ranges="weights")
    assert floats.assign(["a.b"])["a.b"].label == "fp8 per channel static observed"
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
    assert profile.thresholds["kl_over_rtn"] == (0.7 if name == "int4-experts" else 0.5)
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
    assert "lm_head" not in told  # its inputs are seen too
    assert "language_model.model.norm.weight: a vector cannot be quantised" in told
    check_shapes(Profile.model_validate(calibrated()), {f"{LAYER}.self_attn.q_proj.weight": (64, 96)})
    static = Profile.model_validate(calibrated(rules=[selector("re:.*", scheme=STATIC)], calibration=WIDEST))
    with pytest.raises(Problems, match=r"lm_head\.weight: calibration sees no inputs of this tensor"):
        check_shapes(static, {"language_model.lm_head.weight": (160, 64)})
