"""Refuses what a build file asks of a checkpoint or of a backend that neither has, all of it at once."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module

from arriero.errors import ArrieroError, Problems, placed
from arriero.export.build_file.device import target_gpu
from arriero.export.build_file.schema import EMBEDDED, BuildConfig, Samples, Target
from arriero.export.compile.cuda.launch import OPS, check_sizes
from arriero.export.compile.nvidia.gpus import check_product
from arriero.export.samples.cases import draw_cases, show_pictures
from arriero.graphs.config import ModelConfig
from arriero.graphs.names import expert_tensors
from arriero.profiles.data import FAMILIES, TEXT_FAMILIES
from arriero.profiles.recipe import Profile
from arriero.profiles.schemes import Exact, IntBlock, Scheme
from arriero.traits import TRAITS


@dataclass(frozen=True)
class PluginLayer:
    """A MoE layer that becomes our own CUDA kernels: the forms of gate_up and down, under which assignment."""

    layer: int
    forms: tuple[str, str]
    assignment: Mapping[str, Scheme]


def check_fit(build: BuildConfig, config: ModelConfig) -> None:
    """Refuse modalities, devices, caches and contexts that do not fit the checkpoint or the target's backend."""
    problems = []
    if "image" in build.modalities and (blind := _blind(build.calibration)):
        problems.append(blind)
    if "image" in build.modalities and config.vision is None:
        remedy = "Write `modalities: [text]`, or use a multimodal checkpoint"
        problems.append(ArrieroError("the checkpoint has no vision tower", where="modalities", remedy=remedy))
    for number, target in enumerate(build.targets):
        traits = TRAITS[target.backend]
        if target.cpu is not None and traits.compiles_for != "cpu":
            what = f"the backend {target.backend} compiles for no processor: its bundles run on any"
            problems.append(ArrieroError(what, where=f"targets[{number}].cpu", remedy="Remove the key"))
        problems += _gpu_problems(target, f"targets[{number}].gpu")
        if target.kv_cache not in (None, *traits.cache_types):
            kept = "what the profile computes in" if traits.compiles_for == "gpu" else ", ".join(traits.cache_types)
            what = f"the backend {target.backend} keeps keys and values in {kept}"
            problems.append(ArrieroError(what, where=f"targets[{number}].kv_cache", remedy="Remove the key"))
        if config.text.head_dim % traits.head_multiple:
            what = f"the attention of {target.backend} does not take heads of {config.text.head_dim} features"
            expected = f"a head_dim that is a multiple of {traits.head_multiple}"
            problems.append(ArrieroError(what, where=f"targets[{number}].backend", expected=expected))
        if build.runtime_adapters and not traits.switches_adapters:
            what = f"the backend {target.backend} switches between no adapters"
            remedy = "Merge the adapter with `adapters`, in a build file of its own"
            problems.append(ArrieroError(what, where=f"targets[{number}].backend", remedy=remedy))
        if target.context > config.text.max_positions:
            what = f"{target.context:,} tokens are more than the model's positions"
            expected = f"at most {config.text.max_positions:,} (max_position_embeddings)"
            problems.append(ArrieroError(what, where=f"targets[{number}].context", expected=expected))
    if problems:
        raise Problems(f"the build does not fit the checkpoint {build.model}", problems)


def check_schemes(build: BuildConfig, profiles: Mapping[str, Profile]) -> None:
    """Refuse profiles with schemes that their target's backend has no kernels for."""
    problems = []
    for number, target in enumerate(build.targets):
        # Imported by name and late: an unchanged build is planned without the tools of any backend.
        traits = TRAITS[target.backend]
        lowering = import_module(f"arriero.graphs.lower.{traits.module}")
        profile = profiles[target.profile]
        # what is kept beside rules is few and computed anywhere; without rules it is all there is
        schemes = [rule.scheme for form in profile.forms for rule in form.rules] or [Exact()]
        gpu = target_gpu(target)
        lacking = {lack for scheme in schemes if (lack := lowering.lacks(scheme)) is not None}
        if gpu is not None:
            lacking |= {lack for scheme in schemes if (lack := lowering.lacks_on(scheme, gpu.capability)) is not None}
        if lacking:
            what = (
                f"{target.backend} has no kernels for {', '.join(sorted(lacking))}, as profile {profile.name} asks for"
            )
            remedy = "Choose another profile for it, or a backend that has them"
            expected = f"schemes of kind {', '.join(traits.schemes)}"
            problems.append(ArrieroError(what, where=f"targets[{number}]", expected=expected, remedy=remedy))
    if problems:
        raise Problems("the build asks for what its backends cannot do", problems)


def check_experts(
    build: BuildConfig, profiles: Mapping[str, Profile], names: Collection[str], layers: Sequence[int]
) -> None:
    """Refuse schemes of gate_up and down in the MoE `layers` that their target's backend does not take together."""
    problems = []
    for number, target in enumerate(build.targets):
        lowering = import_module(f"arriero.graphs.lower.{TRAITS[target.backend].module}")
        if not hasattr(lowering, "check_experts"):  # it takes any
            continue
        for assignment in (form.assign(names) for form in profiles[target.profile].forms):
            for layer in layers:
                if not set(expert_tensors(layer)) <= assignment.keys():  # others say what is missing
                    continue
                try:
                    lowering.check_experts(assignment, layer)
                except ArrieroError as error:
                    problems.append(placed(error, f"targets[{number}], profile {profiles[target.profile].name}"))
    if problems:
        raise Problems("the build asks for what its backends cannot do", problems)


def plugin_layers(target: Target, profile: Profile, names: Collection[str], layers: Sequence[int]) -> list[PluginLayer]:
    """Those of the MoE `layers` that become our own CUDA kernels on the target's GPU."""
    lowering, gpu = import_module(f"arriero.graphs.lower.{TRAITS[target.backend].module}"), target_gpu(target)
    if gpu is None or not hasattr(lowering, "plugin_forms"):  # it has no plugins
        return []
    return [
        PluginLayer(layer, forms, assignment)
        for assignment in (form.assign(names) for form in profile.forms)
        for layer in layers
        if set(expert_tensors(layer)) <= assignment.keys()  # others say what is missing
        and (forms := lowering.plugin_forms(assignment, layer, gpu.capability)) is not None
    ]


def check_plugins(
    build: BuildConfig,
    profiles: Mapping[str, Profile],
    shapes: Mapping[str, Sequence[int]],
    layers: Sequence[int],
) -> None:
    """Refuse experts of sizes that our own CUDA kernels do not compute, where they are to."""
    problems: dict[str, ArrieroError] = {}
    for number, target in enumerate(build.targets):
        profile = profiles[target.profile]
        for one in plugin_layers(target, profile, shapes, layers):
            names = expert_tensors(one.layer)
            (experts, hidden, double), place = shapes[names[0]], f"targets[{number}], profile {profile.name}"
            for op, form, name in zip(OPS, one.forms, names, strict=True):
                scheme = one.assignment[name]
                block = scheme.block if isinstance(scheme, IntBlock) else 0
                try:
                    check_sizes(op, form, experts, hidden, double // 2, block, name)
                except ArrieroError as error:  # layers are alike: one stands for all
                    problems.setdefault(f"{place} {error.what}", placed(error, place))
    if problems:
        raise Problems("the build asks for what its backends cannot do", list(problems.values()))


def check_elements(build: BuildConfig, profiles: Mapping[str, Profile], shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuse targets for which a tensor would have more elements than their backend takes in one."""
    problems = []
    for number, target in enumerate(build.targets):
        most, gpu, profile = TRAITS[target.backend].most_elements, target_gpu(target), profiles[target.profile]
        if most is None or gpu is None:
            continue
        lowering = import_module(f"arriero.graphs.lower.{TRAITS[target.backend].module}")
        for assignment in (form.assign(shapes) for form in profile.forms):
            narrow = lowering.activations(assignment)
            sizes = {
                name: lowering.stored_elements(shape, assignment[name], narrow, gpu.capability)
                for name, shape in shapes.items()
            }
            largest = max(sizes, key=lambda name: sizes[name])
            if sizes[largest] > most:
                what = f"{largest} would be a tensor of {sizes[largest]:,} elements in profile {profile.name}"
                expected = f"at most {most:,}, which is what {target.backend} takes in one tensor"
                remedy = "Choose a profile in fewer bits, or a backend for processors"
                problems.append(ArrieroError(what, where=f"targets[{number}]", expected=expected, remedy=remedy))
                break
    if problems:
        raise Problems("the checkpoint has tensors that are too large for a backend", problems)


def _gpu_problems(target: Target, where: str) -> list[ArrieroError]:
    """A GPU beside a backend that runs on processors, none where one is needed, or one that it builds nothing for."""
    if TRAITS[target.backend].compiles_for != "gpu":
        what = f"the backend {target.backend} runs on processors"
        return [] if target.gpu is None else [ArrieroError(what, where=where, remedy="Remove the key")]
    try:
        gpu = target_gpu(target)
        assert gpu is not None
        check_product(target.backend, gpu, where)
    except ArrieroError as error:
        return [ArrieroError(error.what, where=where, expected=error.expected, remedy=error.remedy)]
    return []


def _blind(samples: Samples) -> ArrieroError | None:
    """What is wrong with the calibration set of a build that takes in images, if it shows none."""
    if show_pictures(samples):
        return None
    if samples.set == EMBEDDED:
        count, key = samples.samples or 0, "samples"
        expected = f"more than {len(TEXT_FAMILIES)}, better a multiple of the {len(FAMILIES)} task families"
    else:
        count, key = len(draw_cases(samples, ("text", "image"))), "set"
        expected = f"images or videos among what is drawn of {samples.set}"
    what = f"a calibration set of {count} samples holds no images"
    return ArrieroError(what, where=f"calibration.{key}", expected=expected)
