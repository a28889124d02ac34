"""What a build takes of memory and disk, stage by stage, and what its bundles hold; from headers and shapes alone."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

from arriero.export.build_file.device import device_of
from arriero.export.build_file.schema import BuildConfig, Target
from arriero.export.calibration import estimate
from arriero.export.pipeline.cache_plan import cache_bytes, cache_type, kv_bytes
from arriero.export.pipeline.disk_plan import KERNELS_DISK, graphs_disk, parts_of, report_disk
from arriero.export.pipeline.parity_plan import parity_memory
from arriero.export.pipeline.planned import PlannedTarget
from arriero.export.pipeline.record_plan import record_disk, record_memory
from arriero.export.pipeline.stages import split_stage
from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.config import ModelConfig
from arriero.graphs.names import EMBEDDING, HEAD, TEXT_PREFIX
from arriero.graphs.sources.stored_codes import scale_type
from arriero.graphs.sources.weight_source import WeightSource
from arriero.graphs.stored.safetensors_writer import PIECE_BYTES
from arriero.profiles.recipe import Profile, check_shapes
from arriero.profiles.schemes import HALF_BYTES, Chosen, Exact, Fp8, IntBlock, Scheme
from arriero.runtimes.cpu import usable_cores
from arriero.thresholds import AnswerMode
from arriero.traits import TRAITS, BackendTraits

# The estimates' constants, from runs on small models as `benchmarks/plan_accuracy.py` makes them.
TRACE_MEMORY, TRACE_LAYER = 320 << 20, 4 << 20  # Python with torch and onnx, and the graph of a layer
COMPILER_MEMORY, COMPILERS = 306 << 20, 5  # one at work on our kernels, and how many there are to run
ENGINE_MEMORY, ENGINE_COPIES = 1 << 30, 3  # a builder, and the weights: mapped, in its network, serialized
ENGINE_DISK = 64 << 20  # the code in three engines
LARGEST_PIECE = 128 << 20  # pieces of a matrix on their way through
EXPERT_COPIES = 1.25  # of an expert's float32 where it is not rounded in slices: itself, and its codes
CODE_COPIES = 2  # of an expert's codes and scales that were chosen before: in groups as they are packed, and joined
NEAREST_COPIES = 3  # of those that are rounded now: them besides
PACKED_SHARE, PACKING = 0.18, 40 << 20  # of float32's bytes, of quantised matrices but the head, and besides
LOWERED_LAYER = 1_800_000  # a layer's graph as it is lowered and compiled
RTN_LEFT = 50 << 20  # that lowering and measuring the RTN baseline leave behind, beside what a backend does

Need = tuple[int, int]  # of a stage: peak memory and disk, in bytes


def estimate_needs(
    names: Collection[str],
    config: ModelConfig,
    seen: ModelConfig,
    used: Sequence[WeightSource],
    targets: Sequence[PlannedTarget],
    schemes: Mapping[str, Mapping[str, Scheme]],
    calibrates: Sequence[Profile],
    waiting: Collection[str],
    sizes: Sequence[estimate.Size],
    case_sizes: Sequence[estimate.Size],
    answers: AnswerMode,
    side: int,
    memory: tuple[int | None, int | None],
) -> dict[str, Need]:
    """Peak memory and disk of each of the stages `names`; `seen` is the model as far as the modalities need it.

    `schemes` are each target's of every tensor, `waiting` the names of the targets that wait for calibration, `side`
    the bytes of what bundles take from the checkpoint beside weights, `memory` those that the build may use and those
    that are free.
    """
    second = any(profile.rounds_by_gptq for profile in calibrates)
    chooses = any(profile.choose is not None for profile in calibrates)
    calibrated = estimate.walk_disk(config, sizes, calibrates=True) + estimate.roundings_disk(calibrates, used)
    head = estimate.head_memory(calibrates, used)
    walk = estimate.calibration_memory(config, used, sizes, second, chooses, head)
    left = estimate.rounding_leaves(used) if second else 0
    # the first target that is proven has the record made, after calibration if it waits for that
    before = left if targets and targets[0].name in waiting else 0
    needs = {
        "graph": (TRACE_MEMORY + TRACE_LAYER * seen.layers, graphs_disk(seen)),
        "calibrate": (walk, calibrated),
        **{
            name: (before + record_memory(seen, used, case_sizes, answers), record_disk(seen, case_sizes))
            for name in names
            if split_stage(name)[0] == "reference"
        },
    }
    begun = held = estimate.process_memory(seen)  # what stays in the process
    used_before = set[str]()  # and which backends left some of it there
    compilers = min(COMPILERS, usable_cores()) * COMPILER_MEMORY
    first_waiting = next((target.name for target in targets if target.name in waiting), None)
    for target in targets:
        takes = TRAITS[target.backend].footprint
        if target.name == first_waiting:
            needs["calibrate"] = (held - begun + walk, calibrated)
            held += int(estimate.LEFT_LATER * left)
        stays = 0 if target.backend in used_before or target.done else takes.stays
        compiler = takes.compiler // 2 if target.backend in used_before else takes.compiler
        written = target.weights_bytes + graphs_disk(seen) + parts_of(seen) * takes.code + side
        if target.on_gpu:  # engines beside the weights that they are made of
            written += target.weights_bytes + ENGINE_DISK
        if TRAITS[target.backend].compiles_for == "cpu":
            kernels = {name for name in names if name.startswith("kernels-")} - needs.keys()
            needs |= dict.fromkeys(kernels, (held + compilers, KERNELS_DISK))
        code, proving = LOWERED_LAYER * seen.layers, parity_memory(used, target, seen, case_sizes, memory)
        if f"rtn-{target.name}" in names:  # the baseline comes first
            baseline = held + compiler + code + _lower_memory(used, target, schemes[target.name], anew=True)
            held, stays, compiler = held + stays + RTN_LEFT, 0, takes.compiler // 2
            needs[f"rtn-{target.name}"] = (max(baseline, held + proving), written)
        lowering = held + compiler + code + _lower_memory(used, target, schemes[target.name])
        if target.on_gpu:
            lowering = max(lowering, ENGINE_MEMORY + ENGINE_COPIES * target.weights_bytes)
        needs[f"lower-{target.name}"] = (lowering, written)
        held += stays
        used_before |= set() if target.done else {target.backend}
        proof = (held + proving, report_disk(seen, len(case_sizes), calibrated=target.name in waiting))
        needs |= {name: proof for name in names if split_stage(name)[0] == f"parity-{target.name}"}
    return needs


def is_used(info: WeightSource, build: BuildConfig, checkpoint: Checkpoint) -> bool:
    """Whether a tensor goes into the bundles of this build."""
    if "image" in build.modalities or checkpoint.text_only:
        return True
    return info.name.startswith(TEXT_PREFIX)


def plan_target(
    target: Target,
    profile: Profile,
    schemes: Mapping[str, Scheme],
    checkpoint: Checkpoint,
    used: Iterable[WeightSource],
    config: ModelConfig,
    state: Mapping[str, bool],
    adapters: int,
) -> PlannedTarget:
    """The bundle of one target: bytes of its weights by scheme and of its cache; `used` are the tensors in it.

    `schemes` are what `profile` assigns, `adapters` the bytes of what it switches between.
    """
    check_shapes(profile, {name: info.shape for name, info in checkpoint.tensors.items()})
    sizes: dict[str, int] = {"f32": adapters}
    for info in used:
        scheme = schemes[info.name]
        if info.name == EMBEDDING and isinstance(scheme, Exact) and config.text.tied_embeddings:
            sizes["f32"] += scheme.stored_bytes(info.shape)  # the head is a second copy
        label, size = stored_size(info, scheme, profile, TRAITS[target.backend])
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
        quantised=_what_becomes_of(checkpoint.quantised, schemes),
        done=state[f"lower-{target.name}"]
        and all(done for name, done in state.items() if split_stage(name)[0] == f"parity-{target.name}"),
    )


def stored_size(info: WeightSource, scheme: Scheme, profile: Profile, traits: BackendTraits) -> tuple[str, int]:
    """What a tensor's numbers are in a bundle of a backend with such `traits`, in one word, and its bytes."""
    if isinstance(scheme, Chosen):
        assert profile.choose is not None
        return scheme.dtype, int(profile.choose.budget * 2 * math.prod(info.shape))
    # the embedding's table is looked up, not multiplied, so it keeps its own dtype everywhere
    kept = info.name == EMBEDDING or (traits.keeps_stored_dtype and len(info.shape) > 1)
    if isinstance(scheme, Exact) and kept:
        return info.dtype.lower(), info.nbytes
    if isinstance(scheme, IntBlock) and traits.takes_half_scales:
        own = 4 if scale_type(info.codes, scheme) == "F32" else HALF_BYTES
        return scheme.dtype, scheme.stored_bytes(info.shape, own)
    return scheme.dtype, scheme.stored_bytes(info.shape)


def _what_becomes_of(quantised: Iterable[str], schemes: Mapping[str, Scheme]) -> dict[str, int]:
    """Of the tensors that the checkpoint quantises, how many a bundle keeps as they are, and what it does to others."""
    counts: dict[str, int] = {}
    for scheme in (schemes[name] for name in quantised):
        kind = "kept as stored" if scheme.keeps_codes else "exact" if isinstance(scheme, Exact) else "rounded anew"
        counts[kind] = counts.get(kind, 0) + 1
    return counts


def _lower_memory(
    used: Iterable[WeightSource], target: PlannedTarget, schemes: Mapping[str, Scheme], anew: bool = False
) -> int:
    """Estimate lowering: one piece of a matrix is written after another, and one expert; then it is loaded.

    `anew`: what calibration rounded is rounded to nearest. A backend that does not map weights packs what every token
    is multiplied by as it is loaded, in float32 or for what is quantised in about as much for the head and in less for
    the rest.
    """
    takes = TRAITS[target.backend].footprint
    pieces = int(max((_piece(info, schemes[info.name], anew) for info in used), default=0))
    exact = target.is_exact
    if takes.maps_weights:
        linked = exact and TRAITS[target.backend].keeps_stored_dtype
        return 0 if linked else pieces
    every = sum(4 * math.prod(info.shape) for info in used if len(info.shape) == 2 and info.name != EMBEDDING)
    head = sum(4 * math.prod(info.shape) for info in used if info.name == HEAD)
    packed = every if exact else PACKING + head + PACKED_SHARE * (every - head)
    return int(max(pieces, packed))


def _piece(info: WeightSource, scheme: Scheme, anew: bool) -> float:
    """Bytes that the largest piece of a tensor takes on its way into a bundle."""
    numbers = math.prod(info.shape[-2:])
    if len(info.shape) <= 2:
        rounded = isinstance(scheme, IntBlock | Fp8 | Chosen)
        return min(4 * numbers, PIECE_BYTES if rounded else LARGEST_PIECE)
    if isinstance(scheme, Chosen):  # a byte for each code at most
        return (NEAREST_COPIES if anew else CODE_COPIES) * numbers
    if isinstance(scheme, IntBlock | Fp8):
        nearest = anew or scheme.rounding == "nearest"
        return (NEAREST_COPIES if nearest else CODE_COPIES) * scheme.stored_bytes(info.shape[-2:])
    return EXPERT_COPIES * 4 * numbers
