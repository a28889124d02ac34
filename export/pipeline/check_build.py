"""Everything that can be known to stop a build before it begins, found at once; `plan` and `build` run the same list.

Nothing is written and no tensor is read. What is finished is not asked for again: a machine without a target's compiler
may still publish what it compiled before.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib import import_module

from arriero.errors import ArrieroError, Problems, placed, raise_together
from arriero.export.build_file.device import target_gpu
from arriero.export.build_file.schema import EMBEDDED, BuildConfig, Target
from arriero.export.compile.build_kernels import check_compiler
from arriero.export.compile.cpus import NAMED, NATIVE, parse_cpu
from arriero.export.compile.cuda.build_cuda_kernels import find_compilers, kernels_for
from arriero.export.compile.nvidia.gpus import local_gpus
from arriero.export.compile.nvidia.tensorrt_api import PRODUCTS, load
from arriero.export.machine.doctor import find_lacks, load_packages
from arriero.export.pipeline.check_fit import (
    check_elements,
    check_experts,
    check_fit,
    check_plugins,
    check_schemes,
    plugin_layers,
)
from arriero.export.pipeline.check_thresholds import check_pictures, check_thresholds
from arriero.export.pipeline.failure_page import FailurePage
from arriero.export.pipeline.ownership import in_the_way, may_own
from arriero.export.pipeline.sample_sets import SampleSets
from arriero.export.pipeline.stage_keys import kernel_archs, reads_calibration
from arriero.export.pipeline.stages import WorkDir
from arriero.export.pipeline.target_thresholds import thresholds
from arriero.export.proof.check_answers import check_answers
from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.config import ModelConfig
from arriero.graphs.names import expected_tensors
from arriero.graphs.sources.ledger import check_ledger
from arriero.profiles.kv_cache import check_tokens
from arriero.profiles.recipe import Profile, check_shapes
from arriero.runtimes.nvidia.cuda import load_cuda
from arriero.traits import BUILD, SHARED_PACKAGES, TRAITS

LARGEST_TOY = 50_000_000  # parameters; the embedded tasks teach nothing about a larger model
SET_LINES = """\
    calibration:
      set: data/calibration.jsonl   # a line each: {"prompt": "..", "answer": ".."} or {"messages": [..]}
      samples: 512                  # typical of what the model will be asked; or `set: embedded` for the toy tasks"""


class Findings:
    """The problems found so far, whichever check came upon them."""

    def __init__(self) -> None:
        self.raised: list[ArrieroError] = []

    def of(self, check: Callable[..., object], *arguments: object) -> bool:
        """Run a check and keep what it refuses; says whether it refused nothing."""
        try:
            check(*arguments)
        except ArrieroError as error:
            self.raised.append(error)
            return False
        return True

    def problems(self) -> tuple[ArrieroError, ...]:
        """Each problem once."""
        flat = [one for error in self.raised for one in (error.problems if isinstance(error, Problems) else [error])]
        return tuple({str(one): one for one in flat}.values())

    def raise_all(self, headline: str = "the build cannot be done as it is asked for") -> None:
        """Raise what was found: what a single check raised as it is, anything else together."""
        if len(self.raised) == 1:
            raise self.raised[0]
        raise_together(self.problems(), headline)


@dataclass(frozen=True)
class Asked:
    """What a build asks for: its file, checkpoint and profiles, and which stages are to be done."""

    build: BuildConfig
    checkpoint: Checkpoint
    config: ModelConfig
    profiles: Mapping[str, Profile]
    undone: Collection[str]


def check_asked(asked: Asked, found: Findings) -> None:
    """Find what a build asks of checkpoint and backends that they do not have."""
    build, checkpoint, profiles = asked.build, asked.checkpoint, asked.profiles
    found.of(check_fit, build, asked.config)
    found.of(check_thresholds, build, asked.config, profiles)
    for target in build.targets:
        found.of(thresholds, build, target, profiles[target.profile])
    if asked.undone:
        shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
        found.of(check_ledger, checkpoint.tensors.values(), expected_tensors(asked.config))
        if found.of(check_schemes, build, profiles):
            found.of(check_elements, build, profiles, shapes)
            found.of(check_experts, build, profiles, shapes, asked.config.text.moe_layers)
            found.of(check_plugins, build, profiles, shapes, asked.config.text.moe_layers)
        for name, profile in profiles.items():
            users = ", ".join(f"targets[{n}]" for n, target in enumerate(build.targets) if target.profile == name)
            found.of(_check_shapes, profile, shapes, f"{users}, profile {profile.name}")


def _check_shapes(profile: Profile, shapes: Mapping[str, tuple[int, ...]], place: str) -> None:
    """`check_shapes` with `place` in each problem: among those of other checks it stands without its headline."""
    try:
        check_shapes(profile, shapes)
    except Problems as error:
        raise Problems(error.headline, [placed(one, place) for one in error.problems]) from None


def check_ready(asked: Asked, sets: SampleSets, found: Findings) -> None:
    """Find what this machine, the output folder and the samples lack for the stages that are to be done."""
    build, undone = asked.build, asked.undone
    if not undone:
        return
    found.raised += _packages(build, undone)
    if "calibrate" in undone:
        found.of(_check_calibration_set, build, asked.checkpoint, asked.profiles)
    for target in build.targets:
        if f"lower-{target.name}" in undone:
            found.of(_check_compiler, target, kernel_archs(target, asked.profiles[target.profile]))
            found.of(_check_cuda_compilers, target, asked)
        if f"parity-{target.name}" in undone:
            found.of(_check_bindings, target)
    if any(name.startswith("parity-") for name in undone):
        found.raised += _outputs(build, undone)
    found.of(_check_samples, asked, sets, found)


def _packages(build: BuildConfig, undone: Collection[str]) -> list[ArrieroError]:
    """What is not installed, or too old, of what the stages need."""
    backends = {one.backend: TRAITS[one.backend].packages for one in build.targets if f"lower-{one.name}" in undone}
    own = [package for name, packages in backends.items() if TRAITS[name].compiles_for != "gpu" for package in packages]
    return find_lacks([package for package in (*SHARED_PACKAGES, *own) if BUILD in package.needed_for])


def _check_calibration_set(build: BuildConfig, checkpoint: Checkpoint, profiles: Mapping[str, Profile]) -> None:
    """Refuse to calibrate a real checkpoint on the toy tasks that nobody asked for."""
    calibrates = any(reads_calibration(target, profiles) for target in build.targets)
    parameters = sum(math.prod(info.shape) for info in checkpoint.tensors.values())
    if calibrates and "set" not in build.calibration.model_fields_set and parameters > LARGEST_TOY:
        raise ArrieroError(
            f"no calibration set is named, and the embedded one is of toy tasks: it says nothing of a model of "
            f"{parameters:,} parameters",
            where="calibration.set",
            expected="samples of what the model will be asked",
            remedy=f"Write, for example:\n{SET_LINES}\n ",
        )


def _check_compiler(target: Target, archs: Collection[str]) -> None:
    """Refuse what the target's compilers cannot do on this machine; its kernels are compiled for each of `archs`."""
    gpu = target_gpu(target)
    if gpu is not None:
        load(target.backend).check_here(gpu)
    elif not find_lacks(TRAITS[target.backend].packages):
        load_packages(target.backend)
    for arch in sorted(archs):
        check_compiler(arch)
    if archs and target.cpu not in (None, NATIVE, *NAMED) and not find_lacks(TRAITS[target.backend].packages):
        # Imported here: names of ours are known to be good, a triple only the compiler knows.
        import_module(f"arriero.export.compile.{TRAITS[target.backend].module}").llvm_target(
            parse_cpu(target.cpu or NATIVE)
        )


def _check_cuda_compilers(target: Target, asked: Asked) -> None:
    """Refuse engines with our own CUDA kernels inside where nothing compiles these."""
    gpu = target_gpu(target)
    layers = asked.config.text.moe_layers
    if gpu is not None and plugin_layers(target, asked.profiles[target.profile], asked.checkpoint.tensors, layers):
        kernels_for(str(gpu))
        find_compilers()


def _check_bindings(target: Target) -> None:
    """Refuse to prove engines on this machine's GPU without what reaches it."""
    gpu = target_gpu(target)
    if gpu is not None and gpu in local_gpus():
        load_cuda(PRODUCTS[target.backend].extra)


def _outputs(build: BuildConfig, undone: Collection[str]) -> list[ArrieroError]:
    """What is where the build writes and not its own, and a folder that it may not write to."""
    problems = []
    work = WorkDir(build.output)
    if not may_own(work.root):
        problems.append(in_the_way(work.root))
    for target in build.targets:
        if not {f"lower-{target.name}", f"parity-{target.name}"} & set(undone):
            continue
        problems += work.bundles.problems(build.output / target.name)
        problems += FailurePage.of(build.output, target.name).problems()
    there = next(folder for folder in (build.output, *build.output.parents) if folder.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        remedy = "Choose another `output`, or change the folder's owner or mode"
        problems.append(ArrieroError("cannot write here", where=str(there), remedy=remedy))
    return problems


def _check_samples(asked: Asked, sets: SampleSets, found: Findings) -> None:
    """Refuse samples that the model cannot read, and sets that are too small for what they are to show.

    A set from a file is refused likewise by `SampleSets.planned_sizes`, which reads it in any case.
    """
    build, undone = asked.build, asked.undone
    proofs = [target for target in build.targets if f"parity-{target.name}" in undone]
    if not proofs and not {"calibrate", "reference"} & set(undone):
        return
    cramped = [target for target in proofs if target.context < 2]
    found.raised += [
        ArrieroError(
            f"the context of target {target.name} is {target.context} and leaves no room for a prompt and an answer",
            where="targets.context",
            expected="at least 2, better 4096",
        )
        for target in cramped
    ]
    _ = sets.processor  # nothing of the samples can be said without it
    if proofs and not cramped:
        if build.parity.cases.set == EMBEDDED:
            found.of(sets.case_sizes, min(target.context for target in proofs))
        for target in proofs:
            limits = thresholds(build, target, asked.profiles[target.profile])
            found.of(check_answers, sets.cases, limits)
            if "image" in build.modalities:
                found.of(check_pictures, sets.cases, limits)
    narrow = any(target.kv_cache == "int8" for target in build.targets)
    reads_calibration = "calibrate" in undone and (narrow or build.calibration.set == EMBEDDED)
    if reads_calibration and found.of(sets.sample_sizes) and narrow:
        found.of(check_tokens, sum(size[0] for size in sets.sample_sizes()))
