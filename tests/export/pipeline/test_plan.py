"""Plans: right sizes, nothing touched, stages known as done, and misfits refused before any work."""

import dataclasses
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from arriero.errors import ArrieroError, MachineLacks, Problems
from arriero.export.build_file.read import load_build
from arriero.export.build_file.schema import BuildConfig
from arriero.export.cli.show_plan import show_plan
from arriero.export.pipeline.cache_plan import kv_bytes
from arriero.export.pipeline.disk_plan import graphs_disk, report_disk, side_disk
from arriero.export.pipeline.plan import make_plan
from arriero.export.pipeline.planned import Plan
from arriero.export.pipeline.stage_keys import KeyInputs, stage_inputs
from arriero.export.pipeline.stages import Stage, WorkDir, key_of
from arriero.export.pipeline.target_thresholds import thresholds
from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.config import ModelConfig
from arriero.profiles.recipe import load_profile, shipped
from tests.toys import make_maverick_toy, make_scout_toy

BUILD = """\
version: 1
model: model
modalities: [text, image]
output: out
targets:
  - {name: small, backend: onnxruntime, profile: int8, context: 128, batch: 2}
  - {name: exact, backend: onnxruntime, profile: fp32, context: 256}
"""


@pytest.fixture(scope="module")
def scout(tmp_path_factory):
    return make_scout_toy(tmp_path_factory.mktemp("scout"), seed=3)


@pytest.fixture
def folder(tmp_path, scout):
    (tmp_path / "model").symlink_to(scout)
    return tmp_path


def load(folder: Path, text: str = BUILD) -> BuildConfig:
    (folder / "build.yaml").write_text(text)
    return load_build(folder / "build.yaml")


def inputs_of(build: BuildConfig, content: str = "content") -> dict[str, KeyInputs]:
    """What each stage of a build depends on."""
    profiles = {target.profile: load_profile(target.profile) for target in build.targets}
    return stage_inputs(build, Checkpoint.open(build.model), content, profiles)


def finish(build: BuildConfig, names: list[str] | None = None) -> None:
    """Do every stage (or those named) of a build, with empty results."""
    work = WorkDir(build.output)
    with work.locked():
        content = Checkpoint.open(build.model).content_hash(work.hash_memo)
        for name, inputs in inputs_of(build, content).items():
            if names is None or name in names:
                work.run_stage(Stage(name, inputs, lambda folder: None))


def test_planning_touches_nothing(folder):
    build = load(folder)
    before = sorted(folder.rglob("*"))
    plan = make_plan(build)
    assert sorted(folder.rglob("*")) == before
    assert [stage.name for stage in plan.stages] == [*("graph", "reference", *BOTH)]
    assert not any(stage.done or stage.key for stage in plan.stages)
    assert not plan.done


def test_weights_are_those_the_profile_asks_for(folder, scout):
    plan = make_plan(load(folder))
    infos = Checkpoint.open(scout).tensors
    embed = infos["language_model.model.embed_tokens.weight"]
    exact, small = plan.targets[1], plan.targets[0]
    elements = sum(info.nbytes // 2 for info in infos.values())
    assert exact.weights == {"f32": 4 * (elements - embed.nbytes // 2), "bf16": embed.nbytes}
    quantised = sum(
        info.nbytes // 2
        for name, info in infos.items()
        if name.startswith("language_model.model.layers.")
        and ("proj" in name or "expert" in name)
        and not any(kept in name for kept in ("router", "self_attn"))
    )
    # int8 with one float32 scale per block of 32.
    assert small.weights["int8"] == quantised + quantised // 32 * 4
    assert small.weights["f32"] == 4 * (elements - quantised - embed.nbytes // 2)
    assert small.weights_bytes == sum(small.weights.values())


@pytest.mark.parametrize(("name", "word"), [("fp8", "fp8"), ("int8-dynamic", "int8"), ("int8-static", "int8")])
def test_weights_of_a_byte_each_are_counted_with_their_scales(folder, name, word):
    plan = make_plan(load(folder, BUILD.replace("profile: int8", f"profile: {name}"))).targets[0]
    blocks = make_plan(load(folder)).targets[0]
    elements = blocks.weights["int8"] * 32 // 36  # int8 blocks of 32 carry a float32 scale
    assert elements < plan.weights[word] < 1.2 * elements
    assert plan.weights["f32"] == blocks.weights["f32"]


def test_what_is_left_to_choice_is_counted_as_its_budget(folder, scout):
    text = shipped()["mixed"].read_text().replace("block: 64", "block: 16").replace("budget: 0.40", "budget: 0.50")
    (folder / "mine.yaml").write_text(text)
    plan = make_plan(load(folder, BUILD.replace("profile: int8", "profile: mine.yaml"))).targets[0]
    infos = Checkpoint.open(scout).tensors.values()
    matrices = [info for info in infos if ".layers." in info.name and "language" in info.name and len(info.shape) > 1]
    assert plan.weights["chosen"] == sum(info.nbytes // 2 for info in matrices if "router" not in info.name)


@pytest.mark.parametrize(("name", "told"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_a_profile_without_kernels_is_refused_before_anything_runs(folder, name, told):
    words = rf"targets\[0\]: onnxruntime has no kernels for {told}, as profile {name} asks for"
    with pytest.raises(Problems, match=words):
        make_plan(load(folder, BUILD.replace("profile: int8", f"profile: {name}")))


def test_text_bundles_leave_the_vision_tower_out(folder):
    both = make_plan(load(folder)).targets[1].weights_bytes
    text = make_plan(load(folder, BUILD.replace("[text, image]", "[text]"))).targets[1].weights_bytes
    assert 0 < text < both


def test_a_tied_head_is_a_second_copy(tmp_path):
    folder = make_scout_toy(tmp_path / "model", seed=3, vision=False)
    config = json.loads((folder / "config.json").read_text())
    untied = make_plan(load(tmp_path, BUILD.replace("[text, image]", "[text]"))).targets[1].weights
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if n != "lm_head.weight"}, folder / "model.safetensors")
    assert make_plan(load(tmp_path, BUILD.replace("[text, image]", "[text]"))).targets[1].weights == untied


def test_chunked_layers_stop_growing_at_their_chunk(scout):
    text = ModelConfig.load(scout).text
    token = 2 * text.kv_heads * text.head_dim * 4
    assert (text.chunk, sum(layer.chunked for layer in text.layers)) == (16, 3)
    assert kv_bytes(text, 10, 4) == token * 4 * 10
    assert kv_bytes(text, 1000, 4) == token * (3 * 16 + 1000)
    assert kv_bytes(text, 1000, 1) * 4 == kv_bytes(text, 1000, 4)


def test_context_prices(folder, scout):
    plan = make_plan(load(folder))
    assert [price["tokens"] for price in plan.context_prices] == [8192, 131072, 1048576, 10485760]
    assert plan.context_prices[2]["int8"] == kv_bytes(ModelConfig.load(scout).text, 1 << 20, 1)
    assert plan.context_prices[2]["float32"] == 4 * plan.context_prices[2]["int8"]
    assert plan.context_prices[2]["float16"] == 2 * plan.context_prices[2]["int8"]
    assert not plan.context_prices[0]["within_model"]
    assert plan.targets[0].kv_bytes == 2 * kv_bytes(ModelConfig.load(scout).text, 128, 4)


def test_an_int8_cache_is_a_quarter_and_has_keys_and_thresholds_of_its_own(folder):
    plain, other = load(folder), load(folder, BUILD.replace("profile: fp32", "profile: fp32, kv_cache: int8"))
    before, after = make_plan(plain), make_plan(other)
    assert after.targets[1].kv_bytes * 4 == before.targets[1].kv_bytes
    assert (after.targets[1].kv_cache, after.targets[0]) == ("int8", before.targets[0])
    proofs = [next(one for one in plan.stages if one.name == "parity-exact") for plan in (before, after)]
    assert proofs[1].memory < proofs[0].memory
    assert {one.name for one in after.stages} - {one.name for one in before.stages} == {"calibrate"}
    profiles = {target.profile: load_profile(target.profile) for target in plain.targets}
    keys = [{name: key_of(name, inputs) for name, inputs in inputs_of(build).items()} for build in (plain, other)]
    changed = {name for name, key in keys[0].items() if keys[1][name] != key}
    assert changed == {"lower-exact", "parity-exact"}
    own = thresholds(other, other.targets[1], profiles["fp32"])
    assert "logits_max_abs_error" not in own
    assert own["task_accuracy_drop"] == 0.005
    assert thresholds(plain, plain.targets[1], profiles["fp32"]) == profiles["fp32"].thresholds
    strict = load(
        folder, BUILD.replace("fp32", "fp32, kv_cache: int8") + "parity: {thresholds: {router_agreement: 0.5}}"
    )
    assert thresholds(strict, strict.targets[1], profiles["fp32"])["router_agreement"] == 0.5
    console = Console(file=io.StringIO(), width=140)
    show_plan(after, console)
    assert "(int8)" in console.file.getvalue()


def test_forced_routing_is_asked_of_proofs_alone(folder):
    plain, other = load(folder), load(folder, BUILD + "parity: {forced_routing: true}")
    keys = [{name: key_of(name, inputs) for name, inputs in inputs_of(build).items()} for build in (plain, other)]
    proofs = {f"parity-{target.name}" for target in plain.targets}
    assert {name for name, key in keys[0].items() if keys[1][name] != key} == proofs
    assert not any("no routing can be forced" in warning for warning in make_plan(other).warnings)


def test_a_plan_says_how_answers_are_made_and_what_the_record_takes(folder, monkeypatch):
    told = make_plan(load(folder)).reference
    assert (told["answers"], told["record"]) == ("generated", "bundle")
    more = make_plan(load(folder, BUILD + "parity: {cases: {samples: 96}, record: separate}")).reference
    assert (more["record"], more["record_bytes"]) == ("separate", 2 * told["record_bytes"])  # of 48
    monkeypatch.setattr("arriero.export.pipeline.record_plan.GENERATED_BYTES", 1000)  # any checkpoint is large
    large = make_plan(load(folder))
    assert large.reference["answers"] == "forced"
    console = Console(file=io.StringIO(), width=140)
    show_plan(large, console)
    assert "answers are forced; reference record at most about" in console.file.getvalue()
    # once it is made its cases are not drawn again, and nobody knows what it takes
    show_plan(dataclasses.replace(large, reference=large.reference | {"record_bytes": 0}), console)
    assert "answers are forced; reference record in each bundle" in console.file.getvalue()
    assert make_plan(load(folder, BUILD + "parity: {answers: generated}")).reference["answers"] == "generated"


def test_a_profile_s_thresholds_hold_for_the_kind_of_answers_that_there_is(folder):
    forced = load(folder, BUILD + "parity: {answers: forced, thresholds: {task_accuracy_forced_drop.recall: 0.2}}")
    profile = load_profile("int8")
    found = thresholds(forced, forced.targets[0], profile)
    drop = profile.thresholds["task_accuracy_drop"]
    assert found == {
        "router_agreement": profile.thresholds["router_agreement"],
        "task_accuracy_forced_drop": drop,
        "task_accuracy_forced_drop.recall": 0.2,
    }
    for answers, metric in (("forced", "task_accuracy_drop"), ("generated", "greedy_prefix_forced_length")):
        wrong = load(folder, BUILD + f"parity: {{answers: {answers}, thresholds: {{{metric}: 0.5}}}}")
        with pytest.raises(ArrieroError, match=rf"parity.thresholds.{metric}: answers are {answers}"):
            make_plan(wrong)


def test_thresholds_that_the_parity_set_cannot_resolve_are_told(folder):
    plan = make_plan(load(folder))
    (told,) = plan.warnings  # int8 limits the drop of accuracy, fp32 does not
    assert told.startswith("target small: task_accuracy_drop at most 1 %")
    console = Console(file=io.StringIO(), width=140)
    show_plan(plan, console)
    assert "warning: target small: task_accuracy_drop" in console.file.getvalue()
    assert plan.to_json()["warnings"] == (told,)


def test_maverick_and_text_only(tmp_path):
    make_maverick_toy(tmp_path / "model", seed=4)
    plan = make_plan(load(tmp_path, BUILD.replace("[text, image]", "[text]")))
    assert plan.model["layers"] == {"chunked dense": 2, "chunked moe": 1, "global moe": 1}
    assert plan.model["experts"] == 128


def test_finished_stages_are_known_and_need_nothing_more(folder):
    build = load(folder)
    finish(build, ["graph", "reference", "lower-small"])
    plan = make_plan(build)
    assert [stage.name for stage in plan.stages if stage.done] == ["graph", "reference", "lower-small"]
    left = {stage.name: stage.disk for stage in plan.stages if not stage.done}
    assert left.keys() == {"parity-small", "lower-exact", "parity-exact"}
    checkpoint, cases = Checkpoint.open(build.model), build.parity.cases.samples
    assert cases == 48
    seen = checkpoint.model_config()
    beside = graphs_disk(seen) + side_disk(checkpoint)
    # weights of ONNX files are a bundle's own, so that both bundles to be published have them besides
    weights = [target.weights_bytes for target in plan.targets]
    assert [target.copied for target in plan.targets] == weights
    assert plan.disk == sum(weights) + weights[1] + beside + 2 * report_disk(seen, cases, calibrated=False)
    finish(build)
    plan = make_plan(build)
    assert plan.done
    assert (plan.peak_memory, plan.disk) == (0, 0)


BOTH = ("lower-small", "parity-small", "lower-exact", "parity-exact")


@pytest.mark.parametrize(
    ("old", "new", "undone"),
    [
        ("context: 128", "context: 64", ["lower-small", "parity-small"]),
        ("targets:", "parity: {cases: {samples: 5}}\ntargets:", ["reference", "parity-small", "parity-exact"]),
        ("targets:", "parity: {answers: forced}\ntargets:", ["reference", "parity-small", "parity-exact"]),
        ("targets:", "parity: {record: separate}\ntargets:", []),
        ("targets:", "parity: {thresholds: {logits_kl_mean: 1}}\ntargets:", ["parity-small", "parity-exact"]),
        ("targets:", "calibration: {seed: 5}\ntargets:", []),  # nothing is calibrated
        ("targets:", "budgets: {disk: 1GiB}\ntargets:", []),
        ("[text, image]", "[text]", ["graph", "reference", *BOTH]),
    ],
)
def test_a_change_undoes_what_depends_on_it(folder, old, new, undone):
    finish(load(folder))
    left = [stage.name for stage in make_plan(load(folder, BUILD.replace(old, new))).stages if not stage.done]
    assert set(undone) <= set(left)
    if len(undone) < 3 or "reference" in undone:
        assert left == undone


def test_another_checkpoint_undoes_everything(tmp_path):
    model = make_scout_toy(tmp_path / "model", seed=3)
    build = load(tmp_path)
    finish(build)
    (model / "tokenizer.json").write_text("{}")
    assert not any(stage.done for stage in make_plan(build).stages)


def test_an_unchanged_build_is_planned_without_torch(folder):
    """Torch alone takes most of the two seconds that an unchanged rebuild may take."""
    finish(load(folder))
    code = (
        "import sys; from pathlib import Path; from arriero.export.build_file.read import load_build;"
        "from arriero.export.pipeline.plan import make_plan; plan = make_plan(load_build(Path(sys.argv[1])));"
        "assert plan.done; assert not {'torch', 'onnx', 'onnxruntime', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, folder / "build.yaml"], check=True)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("context: 128", "context: 512", r"targets\[0\].context: 512 tokens are more .* at most 256 \(max_position"),
        ("profile: int8", "profile: odd.yaml", "selector `no.such.tensor` matches no tensor"),
    ],
)
def test_builds_that_do_not_fit_the_checkpoint(folder, old, new, message):
    (folder / "odd.yaml").write_text(
        "name: odd\nversion: 1\ndescription: d\nthresholds: {}\n"
        "keep: [{match: 're:.*', reason: r}, {match: no.such.tensor, reason: r}]\n"
    )
    with pytest.raises(Problems, match=message):
        make_plan(load(folder, BUILD.replace(old, new)))


def test_images_need_a_vision_tower(tmp_path):
    make_maverick_toy(tmp_path / "model", seed=4)
    with pytest.raises(
        Problems, match=r"modalities: the checkpoint has no vision tower\. Write `modalities: \[text\]`"
    ):
        make_plan(load(tmp_path))


def test_a_wrong_tensor_is_found_while_planning(tmp_path):
    folder = make_scout_toy(tmp_path / "model", seed=3)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_local_experts"] = 8
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(Problems) as caught:
        make_plan(load(tmp_path))
    assert (
        "layers.{0-3}.feed_forward.experts.gate_up_proj (4 tensors): has shape [4, 64, 64]; expected [8, 64, 64]"
        in str(caught.value)
    )


def test_budgets(folder):
    file = folder / "build.yaml"
    fits = make_plan(load(folder))
    fits.check_budgets(str(file))
    small = make_plan(load(folder, BUILD + "budgets: {host_memory: 256MiB}\n"))
    with pytest.raises(ArrieroError, match=rf"{file}: budgets.host_memory: the build needs about .* more than allowed"):
        small.check_budgets(str(file))
    no_disk = Plan(**{**vars(fits), "disk_available": 10})
    with pytest.raises(MachineLacks, match="has 10 B of disk space free"):
        no_disk.check_budgets(str(file))


def test_plans_for_machines_and_people(folder):
    plan = make_plan(load(folder, BUILD + "budgets: {host_memory: 256MiB}\n"))
    data = json.loads(json.dumps(plan.to_json()))
    assert data["targets"][0]["name"] == "small"
    assert data["done"] is False
    console = Console(file=io.StringIO(), width=140)
    show_plan(plan, console)
    shown = console.file.getvalue()
    for words in ("lower-small", "to do", "exact", "10M (beyond the model)", "too little"):
        assert words in shown


def test_the_released_scout_fits_what_its_cards_say():
    """KV of Scout (48 layers, 8 KV heads of 128, chunk 8192): 12 global layers carry the context alone."""
    from arriero.graphs.config import ModelConfig

    text = ModelConfig.from_dict({"model_type": "llama4_text"}, "config.json").text
    assert kv_bytes(text, 1 << 20, 2) == 2 * 8 * 128 * 2 * (36 * 8192 + 12 * (1 << 20))


def test_keys_do_not_depend_on_the_process(folder):
    build = load(folder)
    code = (
        "import sys, hashlib; from arriero.export.build_file.read import load_build;"
        "from arriero.export.pipeline.stage_keys import stage_inputs; from arriero.profiles.recipe import load_profile;"
        "from arriero.graphs.checkpoint import Checkpoint;"
        "b = load_build(sys.argv[1]); p = {t.profile: load_profile(t.profile) for t in b.targets};"
        "inputs = stage_inputs(b, Checkpoint.open(b.model), 'x', p);"
        "print(hashlib.sha256(repr(inputs).encode()).hexdigest())"
    )
    mine = hashlib.sha256(repr(inputs_of(build, "x")).encode()).hexdigest()
    command = [sys.executable, "-c", code, str(folder / "build.yaml")]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    assert subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.strip() == mine


def test_a_calibration_set_without_images_is_refused(folder):
    few = BUILD + "calibration: {set: embedded, samples: 3, seed: 11}\n"
    with pytest.raises(Problems, match=r"calibration\.samples: a calibration set of 3 samples holds no images"):
        make_plan(load(folder, few))
    make_plan(load(folder, few.replace("[text, image]", "[text]")))


def test_a_set_from_a_file_decides_by_its_content(folder):
    (folder / "a").mkdir()
    (folder / "a" / "seen.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')

    def key(text: str) -> str:
        build = load(folder, BUILD.replace("[text, image]", "[text]") + text)
        return key_of("calibrate", inputs_of(build)["calibrate"])

    first = key("calibration: {set: a/seen.jsonl}\n")
    (folder / "a").rename(folder / "b")
    assert key("calibration: {set: b/seen.jsonl}\n") == first
    assert key("calibration: {set: b/seen.jsonl, samples: 1}\n") != first
    (folder / "b" / "seen.jsonl").write_text('{"prompt": "one"}\n{"prompt": "three"}\n')
    assert key("calibration: {set: b/seen.jsonl}\n") != first


def test_a_plan_of_one_stage_asks_for_what_it_alone_needs(folder):
    plan = make_plan(load(folder))
    needs = {stage.name: (stage.memory, stage.disk) for stage in plan.stages}
    assert plan.peak_memory == max(memory for memory, _ in needs.values())
    copied = sum(target.weights_bytes for target in plan.targets if target.backend == "onnxruntime")
    assert plan.disk == sum(disk for _, disk in needs.values()) + copied
    one = plan.only("graph")
    assert (one.peak_memory, one.disk) == needs["graph"]
    assert "calibrate" not in needs  # which may be asked for all the same
    assert [stage.name for stage in make_plan(load(folder), only=("calibrate",)).stages] == ["calibrate"]


def test_a_profile_that_calibrates_is_part_of_the_calibration_and_of_its_costs(folder):
    rules = Path(shipped()["int4"]).read_text().replace("block: 64", "block: 32")
    (folder / "small4.yaml").write_text(rules.replace("name: int4", "name: small4"))
    plain, changed = load(folder), load(folder, BUILD.replace("profile: int8", "profile: small4.yaml"))
    keys = []
    for build in (plain, changed):
        keys.append(key_of("calibrate", inputs_of(build)["calibrate"]))
    assert keys[0] != keys[1]
    plan = make_plan(changed)
    assert plan.targets[0].weights["int4"] > 0
    disk = {stage.name: stage.disk for stage in plan.stages}
    assert disk["calibrate"] > plan.targets[0].weights["int4"]  # the roundings lie there until they are lowered
    assert plan.disk - disk["calibrate"] > sum(target.weights_bytes for target in plan.targets)


def test_a_block_that_does_not_divide_is_refused_before_anything_is_built(folder):
    with pytest.raises(Problems, match="32 input features do not divide into blocks of 64"):
        make_plan(load(folder, BUILD.replace("profile: int8", "profile: int4")))


def test_a_profile_that_does_not_fit_is_named_with_its_targets_among_other_problems(folder):
    text = BUILD.replace("profile: int8", "profile: int4").replace("context: 256", "context: 99999999")
    assert "context: 99999999" in text
    with pytest.raises(Problems, match=r"targets\[\d\]\.context: 99,999,999 tokens") as caught:
        make_plan(load(folder, text))
    number = next(n for n, one in enumerate(load(folder, text).targets) if one.profile == "int4")
    misfits = [one for one in caught.value.problems if "do not divide" in str(one)]
    assert misfits
    for one in misfits:
        assert str(one).startswith(f"targets[{number}], profile int4: language_model.")


def test_a_processor_is_for_backends_that_compile(folder):
    with pytest.raises(Problems, match=r"targets\[1\]\.cpu: the backend onnxruntime compiles for no processor"):
        make_plan(load(folder, BUILD.replace("profile: fp32,", "profile: fp32, cpu: x86-64-v3,")))


def test_a_scheme_without_a_kernel_is_refused_for_the_backend(folder):
    exact = shipped()["int8"].read_text().replace("accuracy_level: 4", "accuracy_level: 0")
    (folder / "exact8.yaml").write_text(exact)
    text = BUILD.replace("backend: onnxruntime, profile: fp32", "backend: tvm, profile: exact8.yaml")
    with pytest.raises(Problems, match=r"targets\[1\]: tvm has no kernels for .*\(accuracy_level 0\)"):
        make_plan(load(folder, text))


def test_compiled_targets_share_the_kernels_of_their_architecture(folder):
    text = BUILD.replace("backend: onnxruntime, profile: int8", "backend: tvm, cpu: x86-64-v3, profile: int8")
    text = text.replace("backend: onnxruntime, profile: fp32", "backend: tvm, cpu: raspberry-pi-5, profile: fp32")
    plan = make_plan(load(folder, text))
    kernels = [stage.name for stage in plan.stages if stage.name.startswith("kernels-")]
    assert kernels == ["kernels-x86_64", "kernels-aarch64"]
    checkpoint = Checkpoint.open(folder / "model")
    # every matrix in the checkpoint's own bytes, vectors in float32
    matrices = sum(info.nbytes for info in checkpoint.tensors.values() if len(info.shape) > 1)
    assert plan.targets[1].weights["bf16"] == matrices
