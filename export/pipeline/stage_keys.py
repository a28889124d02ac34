"""What every stage of a build depends on, and so its key: inputs, options, tools, and the sources of its own code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from types import MappingProxyType
from typing import Any

from arriero.export.build_file.device import kernel_arch, target_gpu
from arriero.export.build_file.schema import EMBEDDED, BuildConfig, Samples, Target
from arriero.export.compile.build_kernels import describe_compiler
from arriero.export.compile.cpus import NATIVE, parse_cpu
from arriero.export.machine.versions import installed_versions
from arriero.export.pipeline.record_plan import LAYOUTS, record_inputs
from arriero.export.pipeline.sources import source_hash
from arriero.export.pipeline.stages import key_of, subject_stage
from arriero.export.pipeline.target_thresholds import thresholds
from arriero.export.samples.cases import describe_set, draw_cases
from arriero.graphs.checkpoint import Checkpoint
from arriero.profiles.recipe import Profile
from arriero.runtimes.cpu import architecture
from arriero.traits import SHARED_PACKAGES, TRAITS

# The sources that stages begin in: what they import decides the result, and so the key.
TRACES = ("graphs/trace.py", "graphs/check.py", LAYOUTS)
CALIBRATES = ("export/calibration/calibrate.py", "export/proof/reference.py", "export/samples/cases.py", LAYOUTS)
PROVES = ("export/proof/measure_bundle.py", "export/proof/rtn_baseline.py")

KeyInputs = dict[str, Any]
NO_ADAPTERS: Mapping[str, str] = MappingProxyType({})


def stage_inputs(
    build: BuildConfig,
    checkpoint: Checkpoint,
    content_hash: str,
    profiles: Mapping[str, Profile],
    adapted: Mapping[str, str] = NO_ADAPTERS,
) -> dict[str, KeyInputs]:
    """Give every stage of `build` in order, by name, with what its result depends on.

    The stage `calibrate` is among them whether or not a target reads it: it may be asked for alone.
    A later stage names the keys of the earlier ones that it reads, so that a change runs through. `content_hash` is
    that of `checkpoint`, and `adapted` are those of the checkpoint with each of the runtime adapters merged.
    """
    tools = installed_versions(SHARED_PACKAGES)
    seen: KeyInputs = {"checkpoint": content_hash, "modalities": list(build.modalities), "tools": tools}
    stages: dict[str, KeyInputs] = {
        "graph": {
            "shape": _shape(build, checkpoint),
            "tools": tools,
            "source": source_hash(*TRACES),
        },
        "calibrate": {
            **seen,
            "set": _set_inputs(build.calibration, build.modalities),
            "profiles": [rounding_folder(profile) for profile in calibrating(profiles)],
            "source": source_hash(*CALIBRATES),
        },
        **{
            subject_stage("reference", adapter): record_inputs(
                build, content, _set_inputs(build.parity.cases, build.modalities)
            )
            for adapter, content in [(None, content_hash), *adapted.items()]
        },
    }
    for target in build.targets:
        for arch in kernel_archs(target, profiles[target.profile]):
            stages[f"kernels-{arch}"] = {
                "compiler": describe_compiler(arch),
                "source": source_hash("export/compile/kernels", "export/compile/build_kernels.py"),
            }
    kernels = {name: key_of(name, inputs) for name, inputs in stages.items() if name.startswith("kernels-")}
    graph = key_of("graph", stages["graph"])
    calibration = key_of("calibrate", stages["calibrate"])
    for target in build.targets:
        lower, parity = f"lower-{target.name}", f"parity-{target.name}"
        lowered: KeyInputs = {
            "checkpoint": content_hash,
            "graph": graph,
            "calibrate": calibration if reads_calibration(target, profiles) else None,
            "target": target.model_dump(),
            "cpu": asdict(parse_cpu(target.cpu or NATIVE)) if kernel_arch(target) else None,
            "kernels": kernels.get(f"kernels-{kernel_arch(target)}"),
            "gpu": gpu_inputs(target, build.budgets.gpu_memory),
            "tools": installed_versions(TRAITS[target.backend].packages),
            "profile": profiles[target.profile].model_dump(exclude={"thresholds", "description"}),
            "source": source_hash(*_lowers(target)),
        }
        if adapted:
            lowered["adapters"] = dict(adapted)
        proven = {"lower": key_of(lower, lowered), "reference": key_of("reference", stages["reference"])}
        source = source_hash(*PROVES, f"runtimes/{TRAITS[target.backend].module}.py")
        if profiles[target.profile].calibration is not None:
            own = kernels.get(f"kernels-{architecture()}")  # the baseline is measured here
            stages[f"rtn-{target.name}"] = {**proven, "kernels": own, "source": source}
        stages[lower] = lowered
        judged = {
            "thresholds": thresholds(build, target, profiles[target.profile]),
            "forced_routing": build.parity.forced_routing,
            "source": source,
        }
        stages[parity] = {**proven, **judged}
        for adapter in adapted:
            record = subject_stage("reference", adapter)
            stages[subject_stage(parity, adapter)] = {**proven, "reference": key_of(record, stages[record]), **judged}
    return stages


def is_shared(stage: str) -> bool:
    """Whether a stage's key holds nothing of the user's weights, cases or folders, so that other builds can use it."""
    return stage == "graph" or stage.startswith("kernels-")


def _shape(build: BuildConfig, checkpoint: Checkpoint) -> str:
    """The sha256 of all that graphs know of a checkpoint: the model, and each tensor's dtype, shape and size."""
    tensors = [[one.name, one.dtype, one.shape, one.nbytes] for _, one in sorted(checkpoint.tensors.items())]
    known = repr(checkpoint.model_config().taking(build.modalities)), tensors
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def _lowers(target: Target) -> tuple[str, ...]:
    """The sources that a target's lowering begins in, with the folder of the kernels that go into engines."""
    module = TRAITS[target.backend].module
    kernels = ("export/compile/cuda",) if TRAITS[target.backend].compiles_for == "gpu" else ()
    return f"graphs/lower/{module}.py", f"export/compile/{module}.py", LAYOUTS, *kernels


def gpu_inputs(target: Target, memory: int | None) -> KeyInputs | None:
    """What the target's engines depend on beyond the graphs: the GPU, and the `memory` budget."""
    gpu = target_gpu(target)
    return None if gpu is None else {"gpu": str(gpu), "memory": memory}


def kernel_archs(target: Target, profile: Profile) -> set[str]:
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


def reads_calibration(target: Target, profiles: Mapping[str, Profile]) -> bool:
    """Whether what is made for a target depends on what calibration saw."""
    return profiles[target.profile].calibration is not None or target.kv_cache == "int8"


def rounding_folder(profile: Profile) -> str:
    """The folder of a profile's roundings in the stage `calibrate`: its name, and a hash of what decides them."""
    kept = profile.model_dump(mode="json", include={"keep", "rules", "calibration", "choose"})
    return f"{profile.name}-{key_of('roundings', kept)}"
