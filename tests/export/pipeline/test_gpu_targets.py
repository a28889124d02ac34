"""Targets for GPUs, from the build file to the point where only the GPU itself can go on."""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from arriero.errors import ArrieroError, MachineLacks, Problems
from arriero.export.build_file.read import load_build
from arriero.export.build_file.schema import BuildConfig
from arriero.export.cli.show_plan import show_plan
from arriero.export.compile import MemoryBudget, tensorrt_rtx
from arriero.export.compile.cuda import build_cuda_kernels
from arriero.export.compile.nvidia import gpus, tensorrt_api
from arriero.export.compile.nvidia.gpus import Gpu
from arriero.export.machine import versions
from arriero.export.pipeline import build as building
from arriero.export.pipeline import check_build, target_build
from arriero.export.pipeline.check_fit import check_elements, check_plugins
from arriero.export.pipeline.plan import make_plan
from arriero.export.pipeline.stage_keys import stage_inputs
from arriero.graphs.checkpoint import Checkpoint
from arriero.profiles.recipe import load_profile, shipped
from arriero.runtimes.integrity import open_manifest
from arriero.sizes import human_bytes
from tests.command import arriero
from tests.small import small_scout
from tests.toys import make_scout_toy

BUILD = """\
version: 1
model: model
modalities: [text]
output: out
targets:
{targets}
calibration: {{samples: 4}}
parity: {{cases: {{samples: 4}}}}
"""
RTX = "name: card, backend: tensorrt-rtx, profile: fp16, context: 128"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_scout_toy(tmp_path_factory.mktemp("scout"), seed=3)


@pytest.fixture
def folder(tmp_path: Path, toy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for build files on a machine without a GPU."""
    (tmp_path / "model").symlink_to(toy)
    for module in (gpus, target_build):
        monkeypatch.setattr(module, "local_gpus", lambda: ())
    return tmp_path


def load(folder: Path, *targets: str) -> BuildConfig:
    (folder / "build.yaml").write_text(BUILD.format(targets="\n".join(f"  - {{{one}}}" for one in targets)))
    return load_build(folder / "build.yaml")


@pytest.mark.parametrize("gpu", ["rtx-4090", "sm_89", "rtx-pro-6000", "native"])
def test_a_gpu_is_named_as_a_card_or_by_its_capability(folder: Path, gpu: str) -> None:
    assert load(folder, f"{RTX}, gpu: {gpu}").targets[0].gpu == gpu


def test_an_unknown_gpu_is_refused_on_its_line(folder: Path) -> None:
    with pytest.raises(Problems, match=r"build\.yaml:6: targets\[0\]\.gpu: there is no GPU 'rtx-9'"):
        load(folder, f"{RTX}, gpu: rtx-9")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (f"{RTX}, gpu: h100", r"targets\[0\]\.gpu: the backend tensorrt-rtx builds no engines for .*h100"),
        (f"{RTX}", r"targets\[0\]\.gpu: this machine has no NVIDIA GPU .*Name the target's GPU in `gpu`"),
        ("name: x, backend: onnxruntime, profile: fp32, gpu: h100", r"targets\[0\]\.gpu: .*runs on processors"),
        (f"{RTX}, gpu: t4, cpu: native", r"targets\[0\]\.cpu: the backend tensorrt-rtx compiles for no processor"),
        (f"{RTX}, gpu: t4, kv_cache: int8", r"targets\[0\]\.kv_cache: .*in what the profile computes in"),
    ],
    ids=["other product", "no native", "processor", "cpu", "cache"],
)
def test_a_target_that_does_not_fit_is_refused_before_anything_runs(folder: Path, target: str, message: str) -> None:
    with pytest.raises(Problems, match=message):
        make_plan(load(folder, target))


@pytest.mark.parametrize(
    ("profile", "gpu", "told"),
    [
        ("int8", "sm_89", "int8 in blocks of 32"),
        ("int8-dynamic", "sm_89", "int8 activations per token"),
        ("fp8", "sm_89", "fp8 activations per token"),
        ("int4-b128", "sm_89", "int4 in blocks of 128, int8 activations"),
        ("mixed", "sm_89", "int4 in blocks of"),
        ("gpu-fp8", "sm_86", "on sm_86 .fp8 came with sm_89."),
        ("gpu-int8", "sm_75", "on sm_75 .there it takes float16 alone."),
        ("fp32", "sm_75", "exact on sm_75 .there it takes float16 alone."),
        ("bf16", "sm_75", "bfloat16 on sm_75 .bfloat16 came with sm_80."),
    ],
)
def test_a_profile_that_cannot_be_honoured_is_refused_by_name(folder: Path, profile: str, gpu: str, told: str) -> None:
    text = shipped()[profile].read_text().replace("block: 128", "block: 32").replace("block: 64", "block: 32")
    (folder / "own.yaml").write_text(text)  # blocks that divide the toy's features
    told = told.replace("blocks of 128", "blocks of 32")
    with pytest.raises(Problems, match=f"tensorrt-rtx has no kernels for .*{told}"):
        make_plan(load(folder, f"name: x, backend: tensorrt-rtx, profile: own.yaml, context: 128, gpu: {gpu}"))


@pytest.mark.parametrize(
    ("target", "profile", "elements"),
    [
        ("tensorrt", "fp16", 128 * 5120 * 16384),
        ("tensorrt", "gpu-int8", 128 * 16384 * 1280),  # words of four codes
        ("tensorrt", "gpu-fp8", 128 * 16384 * 1280),
        ("tensorrt", "gpu-int4", None),  # words of eight
        ("tensorrt-rtx", "gpu-int4", 128 * 5120 * 16384),  # codes
    ],
)
def test_a_stack_of_more_elements_than_a_tensor_may_have_is_refused(
    folder: Path, target: str, profile: str, elements: int | None
) -> None:
    """As Maverick's stacks of experts have, and Scout's have not."""
    build = load(folder, f"name: x, backend: {target}, profile: {profile}, context: 128, gpu: sm_89")
    profiles = {profile: load_profile(profile)}
    shapes = {name: info.shape for name, info in Checkpoint.open(build.model).tensors.items()}
    name = next(name for name in shapes if name.endswith("experts.gate_up_proj"))
    check_elements(build, profiles, {**shapes, name: (16, 5120, 16384)})
    too_large = {**shapes, name: (128, 5120, 16384)}
    if elements is None:
        check_elements(build, profiles, too_large)
        return
    what = rf"targets\[0\]: {name} would be a tensor of {elements:,} elements in profile {profile}"
    with pytest.raises(Problems, match=what):
        check_elements(build, profiles, too_large)


@pytest.mark.parametrize(
    ("backend", "gpu", "profile", "refused"),
    [
        ("tensorrt", "sm_89", "fp16", True),
        ("tensorrt", "sm_100", "fp16", False),  # which has TensorRT's own mixture of experts
        ("tensorrt", "sm_100", "gpu-int8", True),
        ("tensorrt", "sm_75", "fp16", False),
        ("tensorrt", "sm_89", "fp32", False),  # tiles, as there is no kernel
        ("tensorrt-rtx", "sm_89", "fp16", False),
    ],
)
def test_experts_of_a_width_that_the_cuda_kernels_do_not_compute_are_refused(
    folder: Path, backend: str, gpu: str, profile: str, refused: bool
) -> None:
    build = load(folder, f"name: x, backend: {backend}, profile: {profile}, context: 128, gpu: {gpu}")
    profiles = {profile: load_profile(profile)}
    shapes = {name: info.shape for name, info in Checkpoint.open(build.model).tensors.items()}
    layers = range(4)
    check_plugins(build, profiles, shapes, layers)  # 64 wide
    narrow = {"experts.gate_up_proj": (4, 64, 48), "experts.down_proj": (4, 24, 64)}
    shapes = {name: narrow.get(".".join(name.split(".")[-2:]), shape) for name, shape in shapes.items()}
    if not refused:
        check_plugins(build, profiles, shapes, layers)
        return
    what = r"targets\[0\], profile \S+: .*experts.gate_up_proj: the expert width is 24; expected a multiple of 16"
    with pytest.raises(Problems, match=what) as caught:
        check_plugins(build, profiles, shapes, layers)
    assert len(caught.value.problems) == 1  # for all layers


def test_a_plan_misses_the_tools_that_only_the_build_would_ask_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent() -> None:
        raise MachineLacks("there is no CUDA compiler (`nvcc`)")

    monkeypatch.setattr(build_cuda_kernels, "find_nvcc", absent)
    monkeypatch.setattr(check_build, "local_gpus", lambda: (Gpu(89),))
    monkeypatch.setitem(sys.modules, "cuda", None)
    for module in [name for name in sys.modules if name.startswith("cuda.")]:
        monkeypatch.delitem(sys.modules, module)
    for backend, profile, compiles in (
        ("tensorrt", "fp16", True),
        ("tensorrt", "fp32", False),
        ("tensorrt-rtx", "fp16", False),
    ):
        plan = make_plan(load(folder, f"name: x, backend: {backend}, profile: {profile}, context: 128, gpu: sm_89"))
        told = "\n".join(map(str, plan.problems))
        assert ("there is no CUDA compiler" in told) == compiles, told
        assert "the package cuda-bindings is not installed" in told
    monkeypatch.setattr(check_build, "local_gpus", lambda: ())  # the proof is another machine's
    plan = make_plan(load(folder, f"{RTX}, gpu: sm_89"))
    assert "cuda-bindings" not in "".join(map(str, plan.problems))


@pytest.mark.parametrize("profile", ["fp32", "fp16", "bf16", "int8-static", "gpu-int8", "gpu-fp8"])
def test_the_others_are_planned(folder: Path, profile: str) -> None:
    target = f"name: x, backend: tensorrt-rtx, profile: {profile}, context: 128, gpu: sm_89"
    plan = make_plan(load(folder, target))
    exact = make_plan(load(folder, "name: x, backend: onnxruntime, profile: fp32, context: 128"))
    narrow = profile not in ("fp32", "int8-static")
    assert plan.targets[0].kv_bytes * (2 if narrow else 1) == exact.targets[0].kv_bytes
    kept = {"fp32": "float32", "int8-static": "float32", "bf16": "bfloat16"}.get(profile, "float16")
    assert plan.targets[0].kv_cache == kept


def test_the_gpu_and_the_products_version_decide_what_is_done_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lowering(target: str) -> object:
        build = load(folder, target)
        return stage_inputs(build, Checkpoint.open(build.model), "", {"fp16": load_profile("fp16")})["lower-card"]

    first = lowering(f"{RTX}, gpu: rtx-4090")
    assert first != lowering(f"{RTX}, gpu: rtx-5090")
    monkeypatch.setattr(versions, "version_of", lambda name: "9.9")
    assert first != lowering(f"{RTX}, gpu: rtx-4090")


def test_the_plan_names_the_gpu_and_what_it_holds(folder: Path) -> None:
    plan = make_plan(load(folder, f"{RTX}, gpu: rtx-4090"))
    target = plan.targets[0]
    assert (target.device, plan.gpu_memory) == ("sm_89", target.weights_bytes + target.kv_bytes)
    console = Console(file=io.StringIO(), width=140)
    show_plan(plan, console)
    assert f"GPU: {human_bytes(target.bytes)} of weights and cache" in console.file.getvalue()
    portable = make_plan(load(folder, "name: x, backend: onnxruntime, profile: fp32, context: 128"))
    assert (portable.targets[0].device, portable.gpu_memory) == ("any", 0)


def test_the_gpus_memory_is_a_budget(folder: Path) -> None:
    build = load(folder, f"{RTX}, gpu: rtx-4090")
    plan = make_plan(build)
    target = plan.targets[0]
    plan.check_budgets("build.yaml")
    assert plan.gpu_share("card") is None
    wide = replace(plan, gpu_budget=2 * target.bytes)
    assert wide.gpu_share("card") == MemoryBudget(target.bytes)
    with pytest.raises(ArrieroError, match=r"budgets\.gpu_memory: the build needs about .* of GPU memory"):
        replace(plan, gpu_budget=target.kv_bytes - 1).check_budgets("build.yaml")
    file = folder / "build.yaml"
    file.write_text(file.read_text() + "budgets: {gpu_memory: 24GiB}\n")
    assert make_plan(load_build(file)).gpu_budget == 24 << 30


def test_weights_that_a_budget_has_no_room_for_are_streamed(folder: Path) -> None:
    plan = make_plan(load(folder, f"{RTX}, gpu: rtx-4090"))
    target = plan.targets[0]
    tight = replace(plan, gpu_budget=target.kv_bytes + 8000)
    tight.check_budgets("build.yaml")
    assert tight.gpu_share("card") == MemoryBudget(1000, 7000)
    console = Console(file=io.StringIO(), width=140)
    show_plan(tight, console)
    assert "card: 6.84 KiB of" in console.file.getvalue()


def test_a_product_that_is_missing_is_told_before_anything_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(product: str) -> None:
        raise MachineLacks(f"{product} is not installed")

    monkeypatch.setattr(check_build, "load", missing)
    monkeypatch.setattr(check_build, "_check_samples", lambda *_: None)
    build = load(folder, f"{RTX}, gpu: rtx-4090")
    with pytest.raises(MachineLacks, match="tensorrt-rtx is not installed"):
        building.Build(build, "build.yaml", lambda *told: None).run()
    assert not (folder / "out" / ".work").exists()


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    try:
        tensorrt_api.load("tensorrt-rtx")
    except MachineLacks as lack:
        pytest.skip(str(lack))
    monkeypatch.setattr(target_build, "local_gpus", lambda: ())
    small_scout(tmp_path / "model", vision=False)
    return tmp_path


def test_engines_for_another_gpu_are_published_unproven_and_proven_where_it_is(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = "name: exact, backend: onnxruntime, profile: fp32, context: 1024"
    file, card = small / "build.yaml", RTX.replace("128", "1024")
    text = BUILD.format(targets=f"  - {{{card}, gpu: rtx-4090}}\n  - {{{exact}}}\n")
    file.write_text(text.replace("samples: 4}}", "samples: 4}, thresholds: {task_accuracy_drop: 1.0}}"))
    first = arriero("build", file, "--json")
    assert first.code == 0, first.err
    (device,) = first.json["unproven"].values()
    assert device.startswith("a machine with compute capability 8.9")
    assert (small / "out" / "exact" / "parity.json").is_file()
    card = small / "out" / "card"
    manifest = open_manifest(card, full=True)
    assert (manifest.proven, manifest.target.gpu, manifest.target.plugins) == (False, "sm_89", {})
    assert (manifest.target.arch, manifest.tools["tensorrt-rtx"] > "1") == ("x86_64", True)
    assert {weight.file for weight in manifest.weights.values()} == {"embed.engine", "text.engine"}
    assert manifest.kv_bytes_per_token["global"] == 2 * 2 * 16 * 2
    assert {"embed.engine", "text.engine"} <= {path.name for path in card.iterdir()}
    assert arriero("build", file, "--require-proof").code == 3

    def never(*_: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(tensorrt_rtx, "compile_graphs", never)
    assert arriero("build", file).code == 0
    reached = []
    monkeypatch.setattr(target_build, "local_gpus", lambda: (Gpu(89),))
    monkeypatch.setattr(
        "arriero.export.proof.measure_bundle.measure_bundle", lambda bundle, *_: reached.append(bundle) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):  # the proof itself needs the GPU
        arriero("build", file)
    assert reached == [small / "out" / "card.partial"]
