"""What a build would do, before it does anything: stages, bytes, peak memory, and what context costs.

Nothing is written and no tensor is read: sizes come from the checkpoint's headers and the profile's bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from arriero.errors import ArrieroError
from arriero.export.build_file.device import device_of, kernel_arch, target_gpu
from arriero.export.build_file.schema import EMBEDDED, BuildConfig, Samples, Target
from arriero.export.calibration import estimate
from arriero.export.compile import MemoryBudget
from arriero.export.compile.cpus import NATIVE, parse_cpu
from arriero.export.machine.budget import available_memory, check_budget, free_disk, human_bytes
from arriero.export.machine.doctor import installed_versions
from arriero.export.pipeline.check_fit import check_fit, check_schemes
from arriero.export.pipeline.ignored_files import ignored_files
from arriero.export.pipeline.record_plan import answer_mode, record_bytes, record_inputs, record_memory, walk_bytes
from arriero.export.pipeline.resolution import weak_thresholds
from arriero.export.pipeline.sources import source_hash
from arriero.export.pipeline.stages import WorkDir, key_of
from arriero.export.samples.cases import describe_set, draw_cases, encoded_sizes, scored_counts
from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.config import ModelConfig, TextConfig
from arriero.graphs.names import EMBEDDING, TEXT_PREFIX, expected_tensors
from arriero.graphs.sources.ledger import check_ledger
from arriero.graphs.sources.weight_source import WeightSource
from arriero.profiles.kv_cache import ITEM_BYTES, widen_thresholds
from arriero.profiles.recipe import Profile, check_shapes, load_profile
from arriero.profiles.schemes import Chosen, Exact, Half
from arriero.runtimes.cpu import architecture
from arriero.thresholds import FORCED
from arriero.traits import SHARED_PACKAGES, TRAITS

CONTEXTS = {"8k": 1 << 13, "128k": 1 << 17, "1M": 1 << 20, "10M": 10 << 20}
CACHE_BYTES = {**ITEM_BYTES, "float16": 2, "bfloat16": 2}  # of a number in a cache of keys and values

# The estimates' constants, rounded up from runs on small models.
TOOLS_MEMORY = 1 << 30  # Python with torch, onnx and ONNX Runtime loaded, and the graphs while they are traced
KERNELS_MEMORY = 5 * (512 << 20)  # a compiler for each instruction set and one more, at the same time
KERNELS_DISK = 8 << 20
ENGINE_MEMORY, ENGINE_COPIES = 1 << 30, 3  # a builder, and the weights: mapped, in its network, serialized
SCRATCH_SHARE = 8  # of a GPU's budget beside the cache, one in this many bytes is left to compute in at least
ENGINE_DISK = 64 << 20  # the code in three engines
GRAPH_DISK = 64 << 20  # traced and lowered graphs without weights, tokenizer, reports
LARGEST_PIECE = 256 << 20  # a matrix is rounded in pieces of rows; an expert is rounded whole
PIECE_COPIES = 4  # the piece in float32, over its scales, rounded, and packed

# The sources that stages begin in: what they import decides the result, and so the key.
TRACES = ("graphs/trace.py", "graphs/check.py")
CALIBRATES = ("export/calibration/calibrate.py", "export/proof/reference.py", "export/samples/cases.py")
PROVES = ("export/proof/measure_bundle.py", "export/proof/rtn_baseline.py")

KeyInputs = dict[str, Any]


@dataclass(frozen=True)
class PlannedStage:
    """A stage of the build; `key` is None while the checkpoint has not been hashed yet.

    `memory` and `disk` are estimates, in bytes, of what it takes to do it, done or not.
    """

    name: str
    key: str | None
    done: bool
    memory: int
    disk: int


@dataclass(frozen=True)
class PlannedTarget:
    """A bundle to be: bytes of its weights by scheme, and of the KV cache at its full context and batch.

    `device` is what it is compiled for: an architecture of processors or of GPUs, "any" for a backend that compiles
    for none.
    """

    name: str
    backend: str
    device: str
    profile: str
    context: int
    batch: int
    kv_cache: str
    weights: dict[str, int]
    weights_bytes: int
    kv_bytes: int
    done: bool

    @property
    def on_gpu(self) -> bool:
        """Whether it is compiled for a GPU."""
        return TRAITS[self.backend].compiles_for == "gpu"

    @property
    def bytes(self) -> int:
        """Weights and cache together: what a device holds, beside scratch space."""
        return self.weights_bytes + self.kv_bytes


@dataclass(frozen=True)
class Plan:
    """Everything `arriero plan` says. Sizes in bytes; memory and disk are estimates of what is still to be done."""

    model: dict[str, Any]
    reference: dict[str, Any]  # how answers are made, where the record goes, and its bytes at most
    stages: tuple[PlannedStage, ...]
    targets: tuple[PlannedTarget, ...]
    context_prices: tuple[dict[str, Any], ...]
    memory_available: int | None
    memory_budget: int | None
    disk_available: int
    disk_budget: int | None
    gpu_budget: int | None
    warnings: tuple[str, ...]

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return all(stage.done for stage in self.stages)

    @property
    def peak_memory(self) -> int:
        """Bytes of memory that the hungriest stage still to be done takes."""
        return max((stage.memory for stage in self.stages if not stage.done), default=0)

    @property
    def gpu_memory(self) -> int:
        """Bytes of weights and cache of the largest target for a GPU; scratch space comes on top."""
        return max((target.bytes for target in self.targets if target.on_gpu), default=0)

    @property
    def disk(self) -> int:
        """Bytes of disk that all stages still to be done take together."""
        return sum(stage.disk for stage in self.stages if not stage.done)

    def only(self, *names: str) -> Plan:
        """The plan of these stages alone."""
        return replace(self, stages=tuple(stage for stage in self.stages if stage.name in names))

    def check_budgets(self, file: str) -> None:
        """Refuse a plan that needs more memory or disk than the build file `file` or the machine gives it."""
        where, room = f"{file}: budgets.", self.memory_available
        check_budget("memory", self.peak_memory, budget=self.memory_budget, available=room, where=f"{where}host_memory")
        room = self.disk_available
        check_budget("disk space", self.disk, budget=self.disk_budget, available=room, where=f"{where}disk")
        for target in self.targets:
            if target.on_gpu and not target.done:
                budget = self.gpu_budget  # weights that it has no room for stay with the host
                check_budget("GPU memory", target.kv_bytes, budget=budget, available=None, where=f"{where}gpu_memory")

    def gpu_share(self, name: str) -> MemoryBudget | None:
        """What the GPU's budget leaves the engines of target `name` beside its cache; None without a budget."""
        if self.gpu_budget is None:
            return None
        target = next(target for target in self.targets if target.name == name)
        left = self.gpu_budget - target.kv_bytes
        least = left // SCRATCH_SHARE
        fits = left - target.weights_bytes >= least
        return MemoryBudget(left - target.weights_bytes) if fits else MemoryBudget(least, left - least)

    def to_json(self) -> dict[str, Any]:
        """Give the plan as JSON values."""
        return {**asdict(self), "peak_memory": self.peak_memory, "disk": self.disk, "done": self.done}


def make_plan(build: BuildConfig) -> Plan:
    """Plan `build`. Raises `ArrieroError`/`Problems` for a checkpoint that is not sound or does not fit the build."""
    checkpoint = Checkpoint.open(build.model)
    config = ModelConfig.load(build.model)
    work = WorkDir(build.output)
    profiles = {target.profile: load_profile(target.profile) for target in build.targets}
    content = checkpoint.known_content_hash(work.hash_memo)
    check_fit(build, config)
    inputs = stage_inputs(build, content or "", profiles)
    keys = {name: key_of(name, values) for name, values in inputs.items()}
    state = {name: bool(content) and work.is_done(name, key) for name, key in keys.items()}
    if not all(state.values()):
        check_ledger(checkpoint.tensors.values(), expected_tensors(config))
        check_schemes(build, profiles)
    seen = config if "image" in build.modalities else config.without_vision()
    sizes, case_sizes = _sample_sizes(build, seen, state)
    used = [info for info in checkpoint.tensors.values() if _is_used(info, build, checkpoint)]
    targets = tuple(
        _plan_target(target, profiles[target.profile], checkpoint, used, config, state) for target in build.targets
    )
    calibrates = calibrating(profiles)
    needs = {
        "graph": (TOOLS_MEMORY, 0),
        "calibrate": (
            estimate.calibration_memory(
                config, used, sizes, second=any(profile.rounds_by_gptq for profile in calibrates)
            ),
            estimate.walk_disk(config, sizes) + estimate.roundings_disk(calibrates, used),
        ),
        "reference": (
            record_memory(seen, used, case_sizes),
            record_bytes(seen, case_sizes) + walk_bytes(seen.text, case_sizes),
        ),
    }
    needs |= {name: (KERNELS_MEMORY, KERNELS_DISK) for name in keys if name.startswith("kernels-")}
    for target in targets:
        lowering = (_lower_memory(used), target.weights_bytes)
        if target.on_gpu:  # an engine beside the weights that it is made of
            engine = ENGINE_MEMORY + ENGINE_COPIES * target.weights_bytes
            lowering = (max(lowering[0], engine), 2 * target.weights_bytes + ENGINE_DISK)
        needs[f"lower-{target.name}"] = lowering
        needs[f"parity-{target.name}"] = (_parity_memory(target), GRAPH_DISK)
        # the baseline's weights lie beside the bundle's own while it is measured
        needs[f"rtn-{target.name}"] = (max(lowering[0], _parity_memory(target)), target.weights_bytes + GRAPH_DISK)
    return Plan(
        model=_describe(build, checkpoint, config),
        reference={
            "answers": answer_mode(build),
            "record": build.parity.record,
            "record_bytes": record_bytes(seen, case_sizes),
        },
        stages=tuple(
            PlannedStage(name, key if content else None, state[name], *needs[name]) for name, key in keys.items()
        ),
        targets=targets,
        context_prices=tuple(_price(config.text, label, tokens) for label, tokens in CONTEXTS.items()),
        memory_available=available_memory(),
        memory_budget=build.budgets.host_memory,
        disk_available=free_disk(build.output),
        disk_budget=build.budgets.disk,
        gpu_budget=build.budgets.gpu_memory,
        warnings=(*_warnings(build, profiles), *ignored_files(build.model)),
    )


def _warnings(build: BuildConfig, profiles: Mapping[str, Profile]) -> tuple[str, ...]:
    """What the build does all the same, and its reports say less for."""
    counts = scored_counts(build.parity.cases, build.modalities)
    limits = {target.name: thresholds(build, target, profiles[target.profile]) for target in build.targets}
    return tuple(sentence for name, own in limits.items() for sentence in weak_thresholds(name, own, counts))


def stage_inputs(build: BuildConfig, content_hash: str, profiles: Mapping[str, Profile]) -> dict[str, KeyInputs]:
    """Give every stage of `build` in order, by name, with what its result depends on.

    A later stage names the keys of the earlier ones that it reads, so that a change runs through.
    """
    tools = installed_versions(SHARED_PACKAGES)
    seen: KeyInputs = {"checkpoint": content_hash, "modalities": list(build.modalities), "tools": tools}
    stages: dict[str, KeyInputs] = {
        "graph": {**seen, "source": source_hash(*TRACES)},
        "calibrate": {
            **seen,
            "set": _set_inputs(build.calibration, build.modalities),
            "profiles": [rounding_folder(profile) for profile in calibrating(profiles)],
            "source": source_hash(*CALIBRATES),
        },
        "reference": record_inputs(build, content_hash, _set_inputs(build.parity.cases, build.modalities)),
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
            "cpu": asdict(parse_cpu(target.cpu or NATIVE)) if kernel_arch(target) else None,
            "gpu": gpu_inputs(target, build.budgets.gpu_memory),
            "tools": installed_versions(TRAITS[target.backend].packages),
            "profile": profiles[target.profile].model_dump(exclude={"thresholds", "description"}),
            "source": source_hash(*_lowers(target)),
        }
        proven = {"lower": key_of(lower, stages[lower]), "reference": key_of("reference", stages["reference"])}
        source = source_hash(*PROVES, f"runtimes/{TRAITS[target.backend].module}.py")
        if profiles[target.profile].calibration is not None:
            stages[f"rtn-{target.name}"] = {**proven, "source": source}
        stages[parity] = {
            **proven,
            "thresholds": thresholds(build, target, profiles[target.profile]),
            "source": source,
        }
    return stages


def _lowers(target: Target) -> tuple[str, ...]:
    """The sources that a target's lowering begins in, with the folder of the kernels that go into engines."""
    module = TRAITS[target.backend].module
    kernels = ("export/compile/cuda",) if TRAITS[target.backend].compiles_for == "gpu" else ()
    return f"graphs/lower/{module}.py", f"export/compile/{module}.py", *kernels


def thresholds(build: BuildConfig, target: Target, profile: Profile) -> dict[str, float]:
    """The parity thresholds of `target`: its profile's, with what an int8 cache may cost, and the build file's own.

    A profile's threshold on generated answers holds for forced ones where the build has these; the build file's own are
    refused when they are of the other kind.
    """
    own = widen_thresholds(profile.thresholds) if target.kv_cache == "int8" else profile.thresholds
    forced = answer_mode(build) == "forced"
    other = set(FORCED) if forced else set(FORCED.values())
    for name in build.parity.thresholds:
        if name.partition(".")[0] in other:
            raise ArrieroError(
                f"answers are {'forced' if forced else 'generated'} and this metric is not of these",
                where=f"parity.thresholds.{name}",
                expected=f"one of {', '.join(FORCED.values() if forced else FORCED)}",
                remedy="Name that metric, or say `answers` beside `thresholds`",
            )
    return {(_forced(name) if forced else name): value for name, value in own.items()} | build.parity.thresholds


def _forced(name: str) -> str:
    """The metric on forced answers that stands for a profile's on generated ones; any other is itself."""
    base, dot, family = name.partition(".")
    return f"{FORCED.get(base, base)}{dot}{family}"


def gpu_inputs(target: Target, memory: int | None) -> KeyInputs | None:
    """What the target's engines depend on beyond the graphs: the GPU, and the `memory` budget."""
    gpu = target_gpu(target)
    return None if gpu is None else {"gpu": str(gpu), "memory": memory}


def _kernel_archs(target: Target, profile: Profile) -> set[str]:
    """What a target's build compiles kernels for: its processor, and this one where its RTN baseline is measured."""
    arch = kernel_arch(target)
    return set() if arch is None else {arch, architecture()} if profile.calibration else {arch}


def _set_inputs(samples: Samples, modalities: Sequence[str]) -> KeyInputs:
    """What samples depend on: generated ones on their numbers (and our sources), others on their content."""
    if samples.set == EMBEDDED:
        return samples.model_dump()
    return asdict(describe_set(samples, draw_cases(samples, modalities)))


def calibrating(profiles: Mapping[str, Profile]) -> list[Profile]:
    """The profiles that calibrate, each once, in a fixed order."""
    unique = {rounding_folder(profile): profile for profile in profiles.values() if profile.calibration is not None}
    return [unique[key] for key in sorted(unique)]


def rounding_folder(profile: Profile) -> str:
    """The folder of a profile's roundings in the stage `calibrate`: its name, and a hash of what decides them."""
    kept = profile.model_dump(mode="json", include={"keep", "rules", "calibration", "choose"})
    return f"{profile.name}-{key_of('roundings', kept)}"


def kv_bytes(text: TextConfig, tokens: int, item_bytes: int) -> int:
    """Bytes of the KV cache of one sequence of `tokens`; a chunked layer never holds more than its chunk."""
    slots = sum(min(tokens, text.chunk) if layer.chunked else tokens for layer in text.layers)
    return 2 * text.kv_heads * text.head_dim * item_bytes * slots


def _sample_sizes(
    build: BuildConfig, config: ModelConfig, state: Mapping[str, bool]
) -> tuple[list[estimate.Size], list[estimate.Size]]:
    """Tokens and image tiles of each calibration sample and of each parity case; upper bounds for the embedded sets.

    Sets from files are encoded as long as their stage is to be done, so that a sample which the model cannot read is
    found now. Raises Problems with all of those.
    """
    contexts = [target.context for target in build.targets if not state[f"parity-{target.name}"]]
    rooms: list[tuple[Samples, int | None]] = [  # the most tokens, None once nothing is left to encode for
        (build.calibration, None if state["calibrate"] else config.text.max_positions),
        (build.parity.cases, min(contexts) - 1 if contexts else None),  # room for one token of an answer
    ]
    sizes = [[estimate.embedded_size(config.vision)] * (samples.samples or 0) for samples, _ in rooms]
    todo = [n for n, (samples, most) in enumerate(rooms) if samples.set != EMBEDDED and most is not None]
    if todo:
        # Imported here: an unchanged build never gets this far, and torch takes a second to import.
        from arriero.export.build_file.model_spec import model_spec
        from arriero.runtimes.processor.processor import Processor

        processor = Processor(build.model, model_spec(config))
        for number in todo:
            samples, most = rooms[number]
            assert most is not None
            sizes[number] = encoded_sizes(draw_cases(samples, build.modalities), processor, most)
    return sizes[0], sizes[1]


def _is_used(info: WeightSource, build: BuildConfig, checkpoint: Checkpoint) -> bool:
    if "image" in build.modalities or checkpoint.text_only:
        return True
    return info.name.startswith(TEXT_PREFIX)


def _plan_target(
    target: Target,
    profile: Profile,
    checkpoint: Checkpoint,
    used: Iterable[WeightSource],
    config: ModelConfig,
    state: Mapping[str, bool],
) -> PlannedTarget:
    check_shapes(profile, {name: info.shape for name, info in checkpoint.tensors.items()})
    schemes = profile.assign(checkpoint.tensors)
    sizes: dict[str, int] = {}
    for info in used:
        scheme = schemes[info.name]
        label, size = scheme.dtype, 0 if isinstance(scheme, Chosen) else scheme.stored_bytes(info.shape)
        if isinstance(scheme, Chosen):
            assert profile.choose is not None
            size = int(profile.choose.budget * 2 * math.prod(info.shape))
        elif info.name == EMBEDDING and isinstance(scheme, Exact):
            # The table is looked up, not multiplied, so it keeps its own dtype; a tied head is a second copy in f32.
            sizes["f32"] = sizes.get("f32", 0) + (size if config.text.tied_embeddings else 0)
            label, size = info.dtype.lower(), info.nbytes
        elif TRAITS[target.backend].keeps_stored_dtype and len(info.shape) > 1:
            label, size = info.dtype.lower(), info.nbytes
        sizes[label] = sizes.get(label, 0) + size
    return PlannedTarget(
        name=target.name,
        backend=target.backend,
        device=device_of(target),
        profile=profile.name,
        context=target.context,
        batch=target.batch,
        kv_cache=cache_type(target, profile),
        weights={label: size for label, size in sizes.items() if size},
        weights_bytes=sum(sizes.values()),
        kv_bytes=target.batch * kv_bytes(config.text, target.context, cache_bytes(target, profile)),
        done=state[f"lower-{target.name}"] and state[f"parity-{target.name}"],
    )


def cache_type(target: Target, profile: Profile) -> str:
    """The type of the target's keys and values: as it asks, on GPUs as the profile computes."""
    formats = [rule.scheme.format for rule in profile.rules if isinstance(rule.scheme, Half)]
    return formats[0] if TRAITS[target.backend].compiles_for == "gpu" and formats else target.kv_cache


def cache_bytes(target: Target, profile: Profile) -> int:
    """Bytes of one number in the target's cache of keys and values."""
    return CACHE_BYTES[cache_type(target, profile)]


def _lower_memory(used: Iterable[WeightSource]) -> int:
    """Estimate lowering: one piece of a matrix is rounded after another."""
    matrices = [4 * math.prod(info.shape[-2:]) for info in used]
    experts = [4 * math.prod(info.shape[-2:]) for info in used if len(info.shape) > 2]
    return TOOLS_MEMORY + PIECE_COPIES * max([min(max(matrices, default=0), LARGEST_PIECE), *experts])


def _parity_memory(target: PlannedTarget) -> int:
    """Estimate parity: the bundle's weights (kernels repack them, so a memory map does not help) and its cache."""
    return TOOLS_MEMORY + target.weights_bytes + target.kv_bytes


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
