"""What a build would do, before it does anything: stages, bytes, peak memory, and what context costs.

Nothing is written and no tensor is read: sizes come from the checkpoint's headers and the profile's bits.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from arriero.errors import ArrieroError
from arriero.export.build_file.schema import BuildConfig
from arriero.export.machine.budget import free_disk
from arriero.export.machine.speed import measure_speed
from arriero.export.pipeline.cache_plan import CONTEXTS, price_context
from arriero.export.pipeline.check_build import Asked, Findings, check_asked, check_ready
from arriero.export.pipeline.disk_plan import side_disk
from arriero.export.pipeline.estimate_needs import estimate_needs, is_used, plan_target
from arriero.export.pipeline.estimate_time import Work, estimate_seconds
from arriero.export.pipeline.fitted_profiles import fitted_profiles
from arriero.export.pipeline.ignored_files import ignored_files
from arriero.export.pipeline.planned import Plan, PlannedStage
from arriero.export.pipeline.record_plan import answer_mode, record_bytes
from arriero.export.pipeline.resolution import weak_thresholds
from arriero.export.pipeline.sample_sets import SampleSets
from arriero.export.pipeline.stage_keys import KeyInputs, calibrating, is_shared, reads_calibration, stage_inputs
from arriero.export.pipeline.stages import WorkDir, key_of
from arriero.export.pipeline.target_thresholds import thresholds
from arriero.export.samples.cases import scored_counts, show_pictures
from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.config import ModelConfig
from arriero.graphs.sources.runtime_adapters import RuntimeAdapters
from arriero.profiles.recipe import Profile
from arriero.runtimes.memory import available_memory
from arriero.sizes import human_bytes
from arriero.traits import TRAITS


def make_plan(build: BuildConfig, only: Collection[str] | None = None) -> Plan:
    """Plan `build`, or its stages `only`. What would stop it stands in the plan's `problems`.

    Raises `ArrieroError`/`Problems`, with all of those, for a checkpoint that is not sound or does not fit the build.
    """
    checkpoint = Checkpoint.open(build.model, build.adapters)
    config = checkpoint.model_config()
    work = WorkDir(build.output)
    profiles = fitted_profiles(build, checkpoint)
    content = checkpoint.known_content_hash(work.hash_memo)
    refused, ready = Findings(), Findings()
    inputs: dict[str, KeyInputs] = {}
    switched, hashes = [RuntimeAdapters()], dict[str, str]()
    if refused.of(lambda: switched.append(RuntimeAdapters.read(checkpoint.tensors, build.runtime_adapters))):
        for name, folder in build.runtime_adapters.items():
            hashes[name] = checkpoint.merged([folder]).known_content_hash(work.hash_memo) or ""
    refused.of(lambda: inputs.update(stage_inputs(build, checkpoint, content or "", profiles, hashes)))
    hashed = bool(content) and all(hashes.values())
    waiting = {target.name for target in build.targets if reads_calibration(target, profiles)}
    needless = only is None and not waiting
    keys = {name: key_of(name, values) for name, values in inputs.items() if not (name == "calibrate" and needless)}
    state = {name: hashed and work.is_done(name, key) for name, key in keys.items()}
    undone = {name for name in keys if not state[name] and (only is None or name in only)}
    seen = config.taking(build.modalities)
    asked, sets = Asked(build, checkpoint, config, profiles, undone), SampleSets(build, seen, checkpoint.side_folder)
    check_asked(asked, refused)
    check_ready(asked, sets, ready)
    if refused.raised:
        refused.raised += ready.raised
        refused.raise_all()
    try:
        sizes, case_sizes = sets.planned_sizes(state)
    except ArrieroError as error:
        ready.raised.insert(0, error)
        ready.raise_all()
        raise
    used = [info for info in checkpoint.tensors.values() if is_used(info, build, checkpoint)]
    schemes = {target.name: profiles[target.profile].assign(checkpoint.tensors) for target in build.targets}
    targets = tuple(
        plan_target(
            target,
            profiles[target.profile],
            schemes[target.name],
            checkpoint,
            used,
            config,
            state,
            switched[-1].nbytes,
        )
        for target in build.targets
    )
    available = available_memory()
    needs = estimate_needs(
        keys,
        config,
        seen,
        used,
        targets,
        schemes,
        calibrating(profiles),
        waiting,
        sizes,
        case_sizes,
        answer_mode(build),
        side_disk(checkpoint),
        (build.budgets.host_memory, available),
    )
    answered = sets.answered() if case_sizes and answer_mode(build) == "generated" else 0
    work_to_do = Work(seen, used, sizes, case_sizes, answered, calibrating(profiles), build.parity.forced_routing)
    kept = {name for name in undone if is_shared(name) and work.kept.holds(name, keys[name])}
    times = estimate_seconds(undone - kept, work_to_do, targets, measure_speed()) if undone - kept else {}
    times |= dict.fromkeys(kept, 0.0)
    plan = Plan(
        model=_describe(build, checkpoint, config),
        reference={
            "answers": answer_mode(build),
            "record": build.parity.record,
            "record_bytes": record_bytes(seen, case_sizes),
        },
        stages=tuple(
            PlannedStage(name, key if hashed else None, state[name], *needs[name], times.get(name))
            for name, key in keys.items()
        ),
        targets=targets,
        context_prices=tuple(price_context(config.text, label, tokens) for label, tokens in CONTEXTS.items()),
        memory_available=available,
        memory_budget=build.budgets.host_memory,
        disk_available=free_disk(build.output),
        disk_budget=build.budgets.disk,
        gpu_budget=build.budgets.gpu_memory,
        warnings=(
            *_warnings(build, profiles),
            *ignored_files(checkpoint.side_folder, [*build.adapters, *build.runtime_adapters.values()]),
        ),
        problems=ready.problems(),
    )
    return plan if only is None else plan.only(*only)


def _warnings(build: BuildConfig, profiles: Mapping[str, Profile]) -> tuple[str, ...]:
    """What the build does all the same, and its reports say less for."""
    counts = scored_counts(build.parity.cases, build.modalities)
    limits = {target.name: thresholds(build, target, profiles[target.profile]) for target in build.targets}
    weak = [sentence for name, own in limits.items() for sentence in weak_thresholds(name, own, counts)]
    if "image" in build.modalities and not show_pictures(build.parity.cases):
        weak.append("the bundles take in images, and no parity case shows one: the vision tower is not proven")
    if build.parity.forced_routing:
        weak += [
            f"target {target.name}: no routing can be forced on {target.backend}, and its report will say so"
            for target in build.targets
            if not TRAITS[target.backend].forces_routing
        ]
    return tuple(weak)


def _describe(build: BuildConfig, checkpoint: Checkpoint, config: ModelConfig) -> dict[str, Any]:
    text = config.text
    kinds = [("chunked" if layer.chunked else "global", "moe" if layer.moe else "dense") for layer in text.layers]
    return {
        "folder": str(build.model),
        "model_type": checkpoint.config["model_type"],
        "modalities": list(build.modalities),
        "tensors": len(checkpoint.tensors),
        "layout": checkpoint.layout.name,
        "adapters": [str(folder) for folder in build.adapters],
        "runtime_adapters": {name: str(folder) for name, folder in build.runtime_adapters.items()},
        "stored_as": dict(Counter(info.form for info in checkpoint.tensors.values()).most_common()),
        "bytes": checkpoint.stored_bytes,
        "parameters": sum(math.prod(info.shape) for info in checkpoint.tensors.values()),
        "layers": {f"{attention} {ffn}": kinds.count((attention, ffn)) for attention, ffn in dict.fromkeys(kinds)},
        "experts": text.experts,
        "experts_per_token": text.experts_per_token,
        "chunk": text.chunk,
        "max_positions": text.max_positions,
        "size": human_bytes(checkpoint.stored_bytes),
    }
