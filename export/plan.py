"""What a build would do, before it does anything: stages, bytes, peak memory, and what context costs.

Nothing is written and no tensor is read: sizes come from the checkpoint's headers and the profile's bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from arriero.errors import ArrieroError, Problems
from arriero.export.budget import available_memory, check_budget, free_disk, human_bytes
from arriero.export.compile.cpus import NATIVE, parse_cpu
from arriero.export.doctor import version_of
from arriero.export.schema import BuildConfig, Target
from arriero.export.stages import WorkDir, key_of, source_hash
from arriero.graphs.checkpoint import Checkpoint, TensorInfo, check_ledger
from arriero.graphs.config import ModelConfig, TextConfig
from arriero.graphs.names import EMBEDDING, TEXT_PREFIX, expected_tensors
from arriero.profiles.data import FAMILIES, TEXT_FAMILIES
from arriero.profiles.kv_cache import ITEM_BYTES, widen_thresholds
from arriero.profiles.recipe import LAYER_MATRIX, IntBlock, Profile, Scheme, check_shapes, load_profile
from arriero.runtimes.cpu import architecture

if TYPE_CHECKING:
    from rich.console import Console

CONTEXTS = {"8k": 1 << 13, "128k": 1 << 17, "1M": 1 << 20, "10M": 10 << 20}
TOOLS = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "apache-tvm", "apache-tvm-ffi", "numpy")
COMPILES = ("tvm",)  # backends whose graphs are compiled for a processor, and read exact matrices as they are stored

# The estimates' constants, rounded up from runs on small models.
TOOLS_MEMORY = 1 << 30  # Python with torch, onnx and ONNX Runtime loaded, and the graphs while they are traced
GRAPH_DISK = 64 << 20  # traced and lowered graphs without weights, tokenizer, reports
LARGEST_PIECE = 256 << 20  # a matrix is rounded in pieces of rows; an expert is rounded whole
PIECE_COPIES = 4  # the piece in float32, over its scales, rounded, and packed
MOMENT_COPIES = 5  # second moments in float64: as seen, damped, in GPTQ's order, inverted, factored
SAMPLE_TOKENS = 256  # tokens of a calibration sample

KeyInputs = dict[str, Any]


@dataclass(frozen=True)
class PlannedStage:
    """A stage of the build; `key` is None while the checkpoint has not been hashed yet."""

    name: str
    key: str | None
    done: bool


@dataclass(frozen=True)
class PlannedTarget:
    """A bundle to be: bytes of its weights by scheme, and of the KV cache at its full context and batch."""

    name: str
    backend: str
    profile: str
    context: int
    batch: int
    kv_cache: str
    weights: dict[str, int]
    weights_bytes: int
    kv_bytes: int
    done: bool


@dataclass(frozen=True)
class Plan:
    """Everything `arriero plan` says. Sizes in bytes; memory and disk are estimates of what is still to be done."""

    model: dict[str, Any]
    stages: tuple[PlannedStage, ...]
    targets: tuple[PlannedTarget, ...]
    context_prices: tuple[dict[str, Any], ...]
    peak_memory: int
    memory_available: int | None
    memory_budget: int | None
    disk: int
    disk_available: int
    disk_budget: int | None

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return all(stage.done for stage in self.stages)

    def check_budgets(self, file: str) -> None:
        """Refuse a plan that needs more memory or disk than the build file `file` or the machine gives it."""
        where, room = f"{file}: budgets.", self.memory_available
        check_budget("memory", self.peak_memory, budget=self.memory_budget, available=room, where=f"{where}host_memory")
        room = self.disk_available
        check_budget("disk space", self.disk, budget=self.disk_budget, available=room, where=f"{where}disk")

    def to_json(self) -> dict[str, Any]:
        """Give the plan as JSON values."""
        return {**asdict(self), "done": self.done}

    def render(self, console: Console) -> None:
        """Print the plan for people."""
        from arriero.export.show_plan import show_plan

        show_plan(self, console)


def make_plan(build: BuildConfig) -> Plan:
    """Plan `build`. Raises `ArrieroError`/`Problems` for a checkpoint that is not sound or does not fit the build."""
    checkpoint = Checkpoint.open(build.model)
    config = ModelConfig.load(build.model)
    work = WorkDir(build.output)
    profiles = {target.profile: load_profile(target.profile) for target in build.targets}
    content = checkpoint.known_content_hash(work.hash_memo)
    inputs = stage_inputs(build, content or "", profiles)
    stages = tuple(
        PlannedStage(name, key if content else None, bool(content) and work.is_done(name, key))
        for name, key in ((name, key_of(name, values)) for name, values in inputs.items())
    )
    _check_fit(build, config)
    if not all(stage.done for stage in stages):
        check_ledger(checkpoint.tensors.values(), expected_tensors(config))
    used = [info for info in checkpoint.tensors.values() if _is_used(info, build, checkpoint)]
    state = {stage.name: stage.done for stage in stages}
    targets = tuple(
        _plan_target(target, profiles[target.profile], checkpoint, used, config, state) for target in build.targets
    )
    open_targets = [target for target in targets if not target.done]
    open_weights = sum(target.weights_bytes for target in targets if not state[f"lower-{target.name}"])
    calibrates = [] if state["calibrate"] else calibrating(profiles)
    moments = _moments_memory(used) if calibrates else 0
    calibration_disk = 0 if state["calibrate"] else _walk_disk(build, config.text) + _roundings_disk(calibrates, used)
    return Plan(
        model=_describe(build, checkpoint, config),
        stages=stages,
        targets=targets,
        context_prices=tuple(_price(config.text, label, tokens) for label, tokens in CONTEXTS.items()),
        peak_memory=max((max(_peak_memory(target, used), moments) for target in open_targets), default=0),
        memory_available=available_memory(),
        memory_budget=build.budgets.host_memory,
        disk=open_weights + GRAPH_DISK * len(open_targets) + (calibration_disk if open_targets else 0),
        disk_available=free_disk(build.output),
        disk_budget=build.budgets.disk,
    )


def stage_inputs(build: BuildConfig, content_hash: str, profiles: Mapping[str, Profile]) -> dict[str, KeyInputs]:
    """Give every stage of `build` in order, by name, with what its result depends on.

    A later stage names the keys of the earlier ones that it reads, so that a change runs through.
    """
    tools = {tool: version_of(tool) for tool in TOOLS}
    seen: KeyInputs = {"checkpoint": content_hash, "modalities": list(build.modalities), "tools": tools}
    stages: dict[str, KeyInputs] = {
        # The traced graph's weights point into the checkpoint's files, so where these are matters too.
        "graph": {**seen, "folder": str(build.model), "source": source_hash("graphs")},
        "calibrate": {
            **seen,
            "set": build.calibration.model_dump(),
            "profiles": [rounding_folder(profile) for profile in calibrating(profiles)],
            "source": source_hash(),
        },
    }
    for target in build.targets:
        for arch in _kernel_archs(target, profiles[target.profile]):
            stages[f"kernels-{arch}"] = {
                "source": source_hash("export/compile/kernels", "export/compile/build_kernels.py")
            }
    graph = key_of("graph", stages["graph"])
    coverage = key_of("calibrate", stages["calibrate"])
    for target in build.targets:
        lower, parity = f"lower-{target.name}", f"parity-{target.name}"
        stages[lower] = {
            "graph": graph,
            "calibrate": coverage,
            "target": target.model_dump(),
            "cpu": asdict(parse_cpu(target.cpu or NATIVE)) if target.backend in COMPILES else None,
            "profile": profiles[target.profile].model_dump(exclude={"thresholds", "description"}),
            "source": source_hash("graphs", "profiles", "export"),
        }
        stages[parity] = {
            "lower": key_of(lower, stages[lower]),
            "cases": build.parity.cases.model_dump(),
            "thresholds": thresholds(build, target, profiles[target.profile]),
            "source": source_hash(),
        }
    return stages


def thresholds(build: BuildConfig, target: Target, profile: Profile) -> dict[str, float]:
    """The parity thresholds of `target`: its profile's, with what an int8 cache may cost, and the build file's own."""
    own = widen_thresholds(profile.thresholds) if target.kv_cache == "int8" else profile.thresholds
    return own | build.parity.thresholds


def kernel_arch(target: Target) -> str | None:
    """The architecture that the target's kernels are compiled for; None for a backend that brings its own."""
    return parse_cpu(target.cpu or NATIVE).arch if target.backend in COMPILES else None


def _kernel_archs(target: Target, profile: Profile) -> set[str]:
    """What a target's build compiles kernels for: its processor, and this one where its naive form is measured."""
    arch = kernel_arch(target)
    return set() if arch is None else {arch, architecture()} if profile.calibration else {arch}


def calibrating(profiles: Mapping[str, Profile]) -> list[Profile]:
    """The profiles that calibrate, each once, in a fixed order."""
    unique = {rounding_folder(profile): profile for profile in profiles.values() if profile.calibration is not None}
    return [unique[key] for key in sorted(unique)]


def rounding_folder(profile: Profile) -> str:
    """The folder of a profile's roundings in the stage `calibrate`: its name, and a hash of what decides them."""
    kept = profile.model_dump(mode="json", include={"keep", "rules", "calibration"})
    return f"{profile.name}-{key_of('roundings', kept)}"


def kv_bytes(text: TextConfig, tokens: int, item_bytes: int) -> int:
    """Bytes of the KV cache of one sequence of `tokens`; a chunked layer never holds more than its chunk."""
    slots = sum(min(tokens, text.chunk) if layer.chunked else tokens for layer in text.layers)
    return 2 * text.kv_heads * text.head_dim * item_bytes * slots


def stored_bytes(info: TensorInfo, scheme: Scheme) -> int:
    """Bytes of a tensor in a bundle: packed integers with a float32 scale per block, or float32."""
    elements = math.prod(info.shape)
    if isinstance(scheme, IntBlock):
        return elements * scheme.bits // 8 + 4 * (elements // scheme.block)
    return 4 * elements


def _check_fit(build: BuildConfig, config: ModelConfig) -> None:
    problems = []
    if "image" in build.modalities and build.calibration.samples <= len(TEXT_FAMILIES):
        # Samples are drawn from the families in turn, those of text first.
        problems.append(
            ArrieroError(
                f"a calibration set of {build.calibration.samples} samples holds no images",
                where="calibration.samples",
                expected=f"more than {len(TEXT_FAMILIES)}, better a multiple of the {len(FAMILIES)} task families",
            )
        )
    if "image" in build.modalities and config.vision is None:
        remedy = "Write `modalities: [text]`, or use a multimodal checkpoint"
        problems.append(ArrieroError("the checkpoint has no vision tower", where="modalities", remedy=remedy))
    for number, target in enumerate(build.targets):
        if target.cpu is not None and target.backend not in COMPILES:
            what = f"the backend {target.backend} compiles for no processor: its bundles run on any"
            problems.append(ArrieroError(what, where=f"targets[{number}].cpu", remedy="Remove the key"))
        if target.kv_cache != "float32" and target.backend in COMPILES:
            what = f"the backend {target.backend} keeps keys and values in float32"
            problems.append(ArrieroError(what, where=f"targets[{number}].kv_cache", remedy="Remove the key"))
        if target.context > config.text.max_positions:
            what = f"{target.context:,} tokens are more than the model's positions"
            expected = f"at most {config.text.max_positions:,} (max_position_embeddings)"
            problems.append(ArrieroError(what, where=f"targets[{number}].context", expected=expected))
    if problems:
        raise Problems(f"the build does not fit the checkpoint {build.model}", problems)


def _is_used(info: TensorInfo, build: BuildConfig, checkpoint: Checkpoint) -> bool:
    if "image" in build.modalities or checkpoint.text_only:
        return True
    return info.name.startswith(TEXT_PREFIX)


def _plan_target(
    target: Target,
    profile: Profile,
    checkpoint: Checkpoint,
    used: Iterable[TensorInfo],
    config: ModelConfig,
    state: Mapping[str, bool],
) -> PlannedTarget:
    check_shapes(profile, {name: info.shape for name, info in checkpoint.tensors.items()})
    schemes = profile.assign(checkpoint.tensors)
    sizes: dict[str, int] = {}
    for info in used:
        scheme = schemes[info.name]
        label, size = "f32", stored_bytes(info, scheme)
        if isinstance(scheme, IntBlock):
            label = f"int{scheme.bits}"
        elif info.name == EMBEDDING:
            # The table is looked up, not multiplied, so it keeps its own dtype; a tied head is a second copy in f32.
            sizes["f32"] = sizes.get("f32", 0) + (size if config.text.tied_embeddings else 0)
            label, size = info.dtype.lower(), info.nbytes
        elif target.backend in COMPILES and len(info.shape) > 1:
            label, size = info.dtype.lower(), info.nbytes
        sizes[label] = sizes.get(label, 0) + size
    return PlannedTarget(
        name=target.name,
        backend=target.backend,
        profile=profile.name,
        context=target.context,
        batch=target.batch,
        kv_cache=target.kv_cache,
        weights={label: size for label, size in sizes.items() if size},
        weights_bytes=sum(sizes.values()),
        kv_bytes=target.batch * kv_bytes(config.text, target.context, ITEM_BYTES[target.kv_cache]),
        done=state[f"lower-{target.name}"] and state[f"parity-{target.name}"],
    )


def _peak_memory(target: PlannedTarget, used: Iterable[TensorInfo]) -> int:
    """Estimate the largest of the stages: rounding one piece after another, or parity.

    Parity holds the bundle's weights (kernels repack them, so a memory map does not help), the reference's largest
    matrix in float32 (its other weights stay mapped), and both sides' caches.
    """
    matrices = [4 * math.prod(info.shape[-2:]) for info in used]
    experts = [4 * math.prod(info.shape[-2:]) for info in used if len(info.shape) > 2]
    piece = max([min(max(matrices, default=0), LARGEST_PIECE), *experts])
    reference_cache = target.kv_bytes * ITEM_BYTES["float32"] // ITEM_BYTES[target.kv_cache]
    parity = target.weights_bytes + max(matrices, default=0) + target.kv_bytes + reference_cache
    return TOOLS_MEMORY + max(PIECE_COPIES * piece, parity)


def _moments_memory(used: Iterable[TensorInfo]) -> int:
    """Estimate what calibration holds: moments of one layer's inputs, and of one matrix what GPTQ makes of it."""
    layers = [info for info in used if LAYER_MATRIX.fullmatch(info.name)]
    features = [info.shape[1] for info in layers]
    widest = max(features, default=0)
    pieces = max((4 * math.prod(info.shape[-2:]) for info in layers), default=0)
    inputs_of_a_layer = 4  # attention, its output, feed-forward, its inner activation
    return TOOLS_MEMORY + 8 * (inputs_of_a_layer + MOMENT_COPIES) * widest**2 + PIECE_COPIES * pieces


def _walk_disk(build: BuildConfig, text: TextConfig) -> int:
    """Hidden states before and after a layer, and the rows that its experts read, of all calibration samples."""
    rows = build.calibration.samples * SAMPLE_TOKENS
    return 4 * rows * text.hidden_size * (2 + text.experts_per_token)


def _roundings_disk(profiles: Iterable[Profile], used: Iterable[TensorInfo]) -> int:
    """The calibrated integers and scales, which lie in their stage until the bundle is written."""
    infos = {info.name: info for info in used}
    total = 0
    for profile in profiles:
        for name, scheme in profile.assign(infos).items():
            if isinstance(scheme, IntBlock) and scheme.rounding != "nearest":
                total += stored_bytes(infos[name], scheme)
    return total


def _price(text: TextConfig, label: str, tokens: int) -> dict[str, Any]:
    prices = {dtype: kv_bytes(text, tokens, size) for dtype, size in ITEM_BYTES.items()}
    return {"context": label, "tokens": tokens, **prices, "within_model": tokens <= text.max_positions}


def _describe(build: BuildConfig, checkpoint: Checkpoint, config: ModelConfig) -> dict[str, Any]:
    text = config.text
    kinds = [("chunked" if layer.chunked else "global", "moe" if layer.moe else "dense") for layer in text.layers]
    return {
        "folder": str(build.model),
        "model_type": checkpoint.config["model_type"],
        "modalities": list(build.modalities),
        "tensors": len(checkpoint.tensors),
        "bytes": sum(info.nbytes for info in checkpoint.tensors.values()),
        "parameters": sum(math.prod(info.shape) for info in checkpoint.tensors.values()),
        "layers": {f"{attention} {ffn}": kinds.count((attention, ffn)) for attention, ffn in dict.fromkeys(kinds)},
        "experts": text.experts,
        "experts_per_token": text.experts_per_token,
        "chunk": text.chunk,
        "max_positions": text.max_positions,
        "size": human_bytes(sum(info.nbytes for info in checkpoint.tensors.values())),
    }
