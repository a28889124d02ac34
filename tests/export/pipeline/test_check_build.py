"""`plan` says everything that `build` would refuse, all at once: one list of checks, run by both."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from arriero.errors import ArrieroError, MachineLacks, Problems
from arriero.export.build_file.read import load_build
from arriero.export.build_file.schema import BuildConfig
from arriero.export.machine import doctor
from arriero.export.pipeline import check_build
from arriero.export.pipeline.check_thresholds import check_thresholds
from arriero.export.pipeline.plan import make_plan
from arriero.graphs.checkpoint import Checkpoint
from arriero.profiles.recipe import load_profile, shipped
from arriero.runtimes.cpu import architecture
from tests.command import arriero
from tests.small import small_scout

BUILD = """\
version: 1
model: model
modalities: [text, image]
output: out
targets:
  - {name: small, backend: onnxruntime, profile: PROFILE, context: 1024}
calibration: {samples: 12}
parity: {cases: {samples: 10}}
"""


@pytest.fixture(scope="module")
def scout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_scout(tmp_path_factory.mktemp("scout") / "model")


@pytest.fixture
def folder(tmp_path: Path, scout: Path) -> Path:
    model = tmp_path / "model"
    model.mkdir()
    for file in scout.iterdir():
        (model / file.name).symlink_to(file)
    return tmp_path


def problems(folder: Path, text: str, profile: str = "int8") -> str:
    """What `plan` refuses; `build` refuses it in the same words before it writes anything."""
    file = folder / "build.yaml"
    file.write_text(text.replace("PROFILE", profile))
    told = [arriero(verb, file) for verb in ("plan", "build")]
    assert [one.code for one in told] in ([2, 2], [3, 3])
    refused = [one.err[one.err.index("error:") :] for one in told]
    assert refused[0] == refused[1]
    assert not (folder / "out").exists() or not (folder / "out" / ".work").exists()
    return refused[0]


def test_nothing_is_wrong_with_a_plain_build(folder: Path) -> None:
    (folder / "build.yaml").write_text(BUILD.replace("PROFILE", "int8"))
    assert make_plan(load_build(folder / "build.yaml")).problems == ()


@pytest.mark.parametrize(("backend", "size", "multiple"), [("onnxruntime", 12, 8), ("tvm", 8, 16)])
def test_heads_that_the_attention_of_a_backend_does_not_take(
    tmp_path: Path, backend: str, size: int, multiple: int
) -> None:
    small_scout(tmp_path / "model", vision=False, head_dim=size)
    text = BUILD.replace("text, image", "text").replace("backend: onnxruntime", f"backend: {backend}")
    words = f"the attention of {backend} does not take heads of {size} features"
    assert f"{words}; expected a head_dim that is a multiple of {multiple}" in problems(tmp_path, text)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("context: 1024", "context: 1", "context of target small is 1 and leaves no room for a prompt and an answer"),
        ("context: 1024", "context: 12", "tokens; expected at most 11"),
        ("samples: 12", "samples: 3", "holds no images"),
        ("context: 1024", "context: 1024, kv_cache: int8", "too few for the scales of an int8 key/value cache"),
        ("context: 1024", "context: 1024, kv_cache: float16", "onnxruntime keeps keys and values in float32, int8"),
        ("samples: 10}", "samples: 1}, thresholds: {task_accuracy_drop.shape: 0.1}", "no parity case of shape"),
        ("samples: 10}", "samples: 10}, answers: forced, thresholds: {task_accuracy_drop: 0.1}", "answers are forced"),
        ("samples: 10}", "samples: 3}, thresholds: {vision_relative_l2: 0.1}", "no parity case shows a picture"),
        ("samples: 10}", "samples: 10}, thresholds: {kl_over_rtn: 0.5}", "no target's profile calibrates"),
        ("samples: 10}", "samples: 10}, thresholds: {rtn_kl_mean: 0.5}", "is told and not judged: kl_over_rtn is"),
        ("samples: 10}", "samples: 10}, thresholds: {logits_kl_candidate_routing: 1}", "`arriero parity` with --exact"),
        (
            "samples: 10}",
            "samples: 10}, thresholds: {logits_kl_routing_share: 0.5}",
            "target small: thresholds.logits_kl_routing_share: nothing is measured with forced routing. Write "
            "`forced_routing: true` under `parity`",
        ),
    ],
)
def test_what_the_build_file_asks_for(folder: Path, old: str, new: str, words: str) -> None:
    assert old in BUILD
    assert words in problems(folder, BUILD.replace(old, new))


def test_a_threshold_on_pictures_in_a_build_of_text(folder: Path) -> None:
    text = BUILD.replace(", image", "").replace("samples: 10}", "samples: 10}, thresholds: {vision_relative_l2: 0.1}")
    assert "vision_relative_l2: the build takes in text only" in problems(folder, text)


def test_a_threshold_on_forced_routing_is_judged_where_routing_is_forced(folder: Path) -> None:
    text = BUILD.replace(
        "samples: 10}", "samples: 10}, forced_routing: true, thresholds: {logits_kl_forced_routing: 1}"
    )
    (folder / "build.yaml").write_text(text.replace("PROFILE", "int8"))
    assert make_plan(load_build(folder / "build.yaml")).problems == ()
    assert load_build(folder / "build.yaml").parity.forced_routing
    config = Checkpoint.open(folder / "model").model_config()
    text = text.replace("backend: onnxruntime", "backend: tensorrt, gpu: sm_89").replace("PROFILE", "fp32")
    on_gpu, said = load_build_text(folder, text), "no routing can be forced on tensorrt"
    with pytest.raises(Problems, match=said):
        check_thresholds(on_gpu, config, {"fp32": load_profile("fp32")})
    told = make_plan(load_build_text(folder, text.replace("thresholds: {logits_kl_forced_routing: 1}", "")))
    assert any(f"target small: {said}" in warning for warning in told.warnings)


def load_build_text(folder: Path, text: str) -> BuildConfig:
    (folder / "build.yaml").write_text(text)
    return load_build(folder / "build.yaml")


@pytest.mark.parametrize(("samples", "warned"), [(3, True), (10, False)])
def test_a_parity_set_without_pictures_is_told(folder: Path, samples: int, warned: bool) -> None:
    (folder / "build.yaml").write_text(BUILD.replace("PROFILE", "int8").replace("samples: 10", f"samples: {samples}"))
    warnings = "".join(make_plan(load_build(folder / "build.yaml")).warnings)
    assert ("no parity case shows one: the vision tower is not proven" in warnings) == warned


@pytest.mark.parametrize("file", ["tokenizer.json", "preprocessor_config.json"])
def test_a_checkpoint_without_what_its_processor_needs(folder: Path, file: str) -> None:
    (folder / "model" / file).unlink()
    assert file.partition("_")[0].removesuffix(".json") in problems(folder, BUILD)


def test_a_template_that_refuses(folder: Path) -> None:
    template = folder / "model" / "chat_template.jinja"
    template.unlink()
    template.write_text("{{ raise_exception('only on Sundays') }}")
    assert "only on Sundays" in problems(folder, BUILD)


def test_everything_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the machine, the output folder, the build file and the samples."""
    real = doctor.version_of
    gone = {"torch": None, "onnxscript": "0.1"}
    monkeypatch.setattr(doctor, "version_of", lambda name: gone[name] if name in gone else real(name))
    (folder / "out" / "small").mkdir(parents=True)
    (folder / "out" / "small" / "thesis.txt").write_text("mine")
    (folder / "out" / "small.failed-parity.html").write_text("mine")
    text = BUILD.replace("context: 1024", "context: 1, kv_cache: int8") + "budgets: {host_memory: 2MiB, disk: 1MiB}\n"
    told = problems(folder, text)
    for words in (
        "torch is not installed",
        "onnxscript is version 0.1; expected 0.7.2 or newer",
        "small: is in the bundle's place and is no bundle",
        "small.failed-parity.html: is where the page of a failed parity goes",
        "leaves no room for a prompt and an answer",
        "too few for the scales of an int8",
        "budgets.host_memory",
        "budgets.disk",
    ):
        assert words in told
    assert (folder / "out" / "small" / "thesis.txt").read_text() == "mine"


def test_a_compiler_that_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tvm_ffi", reason="needs apache-tvm: pip install 'arriero[tvm]'")
    monkeypatch.setattr("shutil.which", lambda name: None)
    (folder / "build.yaml").write_text(BUILD.replace("onnxruntime", "tvm").replace("PROFILE", "int8"))
    (problem,) = make_plan(load_build(folder / "build.yaml")).problems
    assert isinstance(problem, MachineLacks)
    assert "there is no C++ compiler" in str(problem)


def test_what_only_the_machine_lacks_has_its_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version_of", lambda name: None)
    told = problems(folder, BUILD)
    assert "onnxruntime is not installed" in told
    assert Problems("several", [MachineLacks("a"), MachineLacks("b")]).exit_code == 3
    assert Problems("several", [MachineLacks("a"), ArrieroError("b")]).exit_code == 2


@pytest.mark.parametrize(
    ("profile", "named", "refused"),
    [("int8-static", False, True), ("int8-static", True, False), ("int8", False, False)],
)
def test_a_real_checkpoint_names_its_calibration_set(
    folder: Path, monkeypatch: pytest.MonkeyPatch, profile: str, named: bool, refused: bool
) -> None:
    """The toy tasks are right for toys; the message shows the lines to write, and they can be written so."""
    monkeypatch.setattr(check_build, "LARGEST_TOY", 1000)
    text = BUILD.replace("{samples: 12}", "{set: embedded, samples: 12}" if named else "{samples: 12}")
    file = folder / "build.yaml"
    file.write_text(text.replace("PROFILE", profile))
    found = "\n".join(map(str, make_plan(load_build(file)).problems))
    assert ("no calibration set is named" in found) == refused
    if refused:
        assert check_build.SET_LINES in found
        (folder / "data").mkdir()
        (folder / "data" / "calibration.jsonl").write_text('{"prompt": "a", "answer": "b"}\n' * 512)
        lines = "\n".join(line.removeprefix("    ") for line in check_build.SET_LINES.splitlines())
        kept = text.replace("calibration: {samples: 12}\n", f"{lines}\n").replace("[text, image]", "[text]")
        file.write_text(kept.replace("PROFILE", profile))
        assert make_plan(load_build(file)).problems == ()


def test_a_budget_that_no_candidate_meets(folder: Path) -> None:
    text = shipped()["mixed"].read_text().replace("block: 64", "block: 16").replace("budget: 0.40", "budget: 0.10")
    (folder / "mine.yaml").write_text(text)
    assert "choose.budget: even the smallest candidate takes" in problems(folder, BUILD, "mine.yaml")


@pytest.mark.parametrize(
    ("cpu", "words"),
    [
        ("x86_64-linux-gnu pentium99", "LLVM knows no x86_64 processor 'pentium99'"),
        ("x86_64-linux-gnu x86-64 +avx2 +nonsense", "LLVM knows no feature +nonsense of x86_64"),
    ],
)
def test_a_processor_that_only_the_compiler_knows(folder: Path, cpu: str, words: str) -> None:
    pytest.importorskip("tvm", reason="needs apache-tvm: pip install 'arriero[tvm]'")
    assert words in problems(folder, BUILD.replace("onnxruntime", f"tvm, cpu: {cpu}"))


def changed(folder: Path, rules: str) -> str:
    """A profile of float32 with `rules` ahead of its own."""
    (folder / "mine.yaml").write_text(
        "name: mine\nversion: 1\ndescription: d\nthresholds: {logits_kl_mean: 9}\nrules:\n"
        f"{rules}  - {{match: 're:.*', scheme: {{kind: exact}}, reason: r}}\n"
    )
    return "mine.yaml"


def test_experts_that_no_single_kernel_takes(folder: Path) -> None:
    scheme = "{kind: int_block, bits: 8, block: 32, accuracy_level: 4}"
    mine = changed(folder, f"  - {{match: 're:.*gate_up_proj', scheme: {scheme}, reason: r}}\n")
    told = problems(folder, BUILD, mine)
    assert "experts.down_proj: the profile gives gate_up and down of one layer's experts schemes" in told
    (folder / "build.yaml").write_text(BUILD.replace("onnxruntime", "tvm").replace("PROFILE", mine))
    assert "single kernel" not in "".join(map(str, make_plan(load_build(folder / "build.yaml")).problems))


def test_a_table_is_not_quantised(folder: Path) -> None:
    mine = changed(folder, "  - {match: embeddings, scheme: {kind: int8_dynamic}, reason: r}\n")
    assert "embed_tokens.weight: it is a table that is read row by row" in problems(folder, BUILD, mine)


@pytest.mark.parametrize("is_folder", [True, False])
def test_what_is_in_the_work_folders_place(folder: Path, is_folder: bool) -> None:
    place = folder / "out" / ".work"
    (place if is_folder else place.parent).mkdir(parents=True)
    (place / "thesis.txt" if is_folder else place).write_text("mine")
    (folder / "build.yaml").write_text(BUILD.replace("PROFILE", "int8"))
    (problem,) = make_plan(load_build(folder / "build.yaml")).problems
    assert "/.work: is in the way of the build, and no build made it" in str(problem)


def test_a_compiler_for_the_baseline_of_a_foreign_target(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels for this machine measure the RTN baseline of a target for another."""
    pytest.importorskip("tvm_ffi", reason="needs apache-tvm: pip install 'arriero[tvm]'")
    other = "arm64-v8" if architecture() == "x86_64" else "x86-64"
    monkeypatch.setattr("shutil.which", lambda name: None if name == "g++" else name)
    for profile, lacks in (("int8", 0), ("mine.yaml", 1)):
        own = shipped()["int4"].read_text().replace("block: 64", "block: 32")
        (folder / "mine.yaml").write_text(own)
        (folder / "build.yaml").write_text(
            BUILD.replace("onnxruntime", f"tvm, cpu: {other}").replace("PROFILE", profile)
        )
        found = make_plan(load_build(folder / "build.yaml")).problems
        assert [f"there is no C++ compiler for {architecture()}" in str(one) for one in found] == [True] * lacks


def test_a_compiler_that_cannot_compile_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_scout(tmp_path / "model", vision=False)
    (tmp_path / "g++").write_text("#!/bin/sh\necho 'error: unrecognized option -std=c++17' >&2; exit 1")
    (tmp_path / "g++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    text = BUILD.replace("text, image", "text").replace("backend: onnxruntime", "backend: tvm")
    assert "cannot compile our kernels: error: unrecognized option -std=c++17" in problems(tmp_path, text)


def test_a_backend_that_is_installed_and_does_not_load(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "onnxruntime.py").write_text("raise OSError('bad build')\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    assert "the package onnxruntime is installed and does not load: bad build" in problems(folder, BUILD)
