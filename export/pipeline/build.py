"""The build on one page: checkpoint, graph, calibration, then per target lowering, compilation, parity, publication.

Every step is a content-keyed stage (`stages.py`), so that a killed build goes on where it stopped and an unchanged one
does nothing. A bundle appears under its name only after its parity passed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arriero.errors import ArrieroError, BelowThreshold, MachineLacks, Problems
from arriero.export.build_file.device import kernel_arch, target_gpu
from arriero.export.build_file.model_spec import model_spec
from arriero.export.build_file.schema import BuildConfig, Target
from arriero.export.compile import Device
from arriero.export.compile.cpus import NATIVE
from arriero.export.compile.nvidia.engine_shapes import Limits
from arriero.export.compile.nvidia.gpus import Gpu, local_gpus
from arriero.export.compile.nvidia.tensorrt_api import load
from arriero.export.pipeline.bundle import Parts, assemble, copy_tokenizer, is_current, write_manifest
from arriero.export.pipeline.parts import read_part, write_part
from arriero.export.pipeline.plan import (
    cache_bytes,
    calibrating,
    make_plan,
    rounding_folder,
    stage_inputs,
    thresholds,
)
from arriero.export.pipeline.stages import Stage, WorkDir, key_of, read_record
from arriero.export.proof.emulate import check_emulation
from arriero.export.samples.cases import describe_set, draw_cases, encoded_sizes
from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.config import ModelConfig
from arriero.profiles.kv_cache import CacheScales, cache_scales, check_tokens
from arriero.profiles.quantized_weights import QuantizedWeights
from arriero.profiles.recipe import Profile, load_profile
from arriero.runtimes.cpu import architecture
from arriero.runtimes.manifest import CalibratedPart, Compiled, LoweredPart, Measured, RoundedPart, StoredWeight
from arriero.traits import TRAITS

if TYPE_CHECKING:
    from arriero.export.proof.prove import Judge
    from arriero.graphs.check import Part

# What a watcher is told: the step, how much of it is done, of how much, and in which unit ("bytes" or "samples").
Watch = Callable[[str, int, int, str], None]


NEEDS_GPU = "a machine with the GPU that the engines are for"
GO_ON = "Run the same command there with this output folder and the same versions: it goes on from here"


class UnprovenHere(MachineLacks):
    """A target was built as far as this machine goes. `told` names it with its GPU."""

    def __init__(self, target: str, gpu: Gpu, lowered: Path) -> None:
        """Say that the engines in `lowered` run on `gpu` and not here."""
        self.told = f"{target} for {gpu}"
        here = ", ".join(map(str, local_gpus())) or "none"
        super().__init__(
            f"target {target} is compiled and kept, and not proven: its engines run on {gpu.told} alone, and this "
            f"machine has {here}",
            where=str(lowered),
            expected=NEEDS_GPU,
            remedy=GO_ON,
        )


@dataclass(frozen=True)
class Made:
    """What the targets of a build are made of: the folders of finished stages, and the kernels' object file."""

    graph: Path
    calibrated: Path
    kernels: Path | None


class Build:
    """One build file at work."""

    def __init__(self, config: BuildConfig, file: str, watch: Watch) -> None:
        """Prepare to build `config`, read from `file`; `watch` is told of progress."""
        self.config, self.file, self.watch = config, file, watch
        self.work = WorkDir(config.output)
        self.profiles = {target.profile: load_profile(target.profile) for target in config.targets}

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint's headers."""
        return Checkpoint.open(self.config.model)

    @cached_property
    def model(self) -> ModelConfig:
        """The model as far as the build's modalities need it."""
        config = ModelConfig.load(self.config.model)
        return config if "image" in self.config.modalities else config.without_vision()

    @cached_property
    def judge(self) -> Judge:
        """What every target is judged by; opened with the first that is."""
        from arriero.export.proof.prove import Judge

        return Judge.open(self.config.model, self.config.parity.cases, self.config.modalities)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The graphs of a bundle."""
        return ("embed", "text") if self.model.vision is None else ("embed", "vision", "text")

    def run(self) -> list[Path]:
        """Build every target and give the bundle folders. Raises `ArrieroError` with what stopped it."""
        plan = self.plan = make_plan(self.config)
        plan.check_budgets(self.file)
        self.check_outputs()
        if not plan.done:
            self.check_inputs()
            self.check_products({stage.name for stage in plan.stages if stage.done})
        with self.at_work():
            bundles, lacks = [], []
            for target in self.config.targets:
                try:
                    bundles.append(self.build_target(target))
                except UnprovenHere as lack:  # what this machine cannot prove keeps the other targets from nothing
                    lacks.append(lack)
            self.work.prune((name, key_of(name, values)) for name, values in self.inputs.items())
        if len(lacks) > 1:
            names = ", ".join(lack.told for lack in lacks)
            what = f"{len(lacks)} targets are compiled and kept, and not proven, because this machine has no such GPU: "
            raise MachineLacks(what + names, where=str(self.work.root), expected=NEEDS_GPU, remedy=GO_ON)
        if lacks:
            raise lacks[0]
        return bundles

    def run_calibration(self) -> dict[str, Any]:
        """Run the stage `calibrate` alone and describe what it saw. A later `run` of the build file takes it over."""
        from arriero.export.calibration.coverage import describe_calibration

        plan = make_plan(self.config).only("calibrate")
        plan.check_budgets(self.file)
        if not plan.done:
            self.check_inputs()
        with self.at_work():
            folder = self.stage("calibrate", self.calibrate, resumes=True)
            planned = None if plan.done else plan.stages[0].memory
            part = read_part(CalibratedPart, folder)
            return describe_calibration(folder, part, read_record(folder), calibrating(self.profiles), planned)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Hold the output folder; within, what every stage depends on is known."""
        with self.work.locked():
            self.watch("hash checkpoint", 0, 0, "bytes")
            self.content = self.checkpoint.content_hash(self.work.hash_memo)
            self.inputs = stage_inputs(self.config, self.content, self.profiles)
            yield

    def check_outputs(self) -> None:
        """Refuse to put a bundle in the place of something that is none."""
        problems = []
        for target in self.config.targets:
            place = self.config.output / target.name
            if place.is_file() or (place.is_dir() and any(place.iterdir()) and not (place / "manifest.json").is_file()):
                remedy = "Choose another `output` or target name, or move it away"
                problems.append(
                    ArrieroError("is in the bundle's place and is no bundle", where=str(place), remedy=remedy)
                )
        if problems:
            raise Problems(f"{self.file}: bundles cannot be published", problems)

    def check_products(self, done: set[str]) -> None:
        """Refuse engines that cannot be compiled here, before anything is calibrated; `done` are finished stages."""
        for target in self.config.targets:
            gpu = target_gpu(target)
            if gpu is not None and f"lower-{target.name}" not in done:
                load(target.backend).check_here(gpu)

    def check_inputs(self) -> None:
        """Refuse what would end the work late: a checkpoint without its processor, parity cases that do not fit a
        target's context, or have no answers where answers are judged.
        """
        from arriero.export.proof.prove import check_answers
        from arriero.runtimes.processor.processor import Processor

        for number, target in enumerate(self.config.targets):
            arch = kernel_arch(target)
            if arch not in (None, architecture()):
                check_emulation(str(arch), f"{self.file}: targets[{number}].cpu")
        processor = Processor(self.config.model, model_spec(self.model))
        room = min(target.context for target in self.config.targets) - 1  # one token of an answer
        cases = draw_cases(self.config.parity.cases, self.config.modalities)
        encoded_sizes(cases, processor, room)
        for target in self.config.targets:
            check_answers(cases, thresholds(self.config, target, self.profiles[target.profile]))

    def build_target(self, target: Target) -> Path:
        """Lower, prove and publish one target; at once when its bundle is current."""
        bundle = self.config.output / target.name
        lower, parity = f"lower-{target.name}", f"parity-{target.name}"
        build = {name: key_of(name, self.inputs[name]) for name in ("graph", "calibrate", lower, parity)}
        if is_current(bundle, build):
            self.failure_page(target).unlink(missing_ok=True)
            self.watch(f"{target.name}: up to date", 1, 1, "bundles")
            return bundle
        graph = self.stage("graph", self.trace)
        calibrated = self.stage("calibrate", self.calibrate, resumes=True)
        made = Made(graph, calibrated, self.kernels(target))
        lowered = self.stage(lower, partial(self.lower, target, made), resumes=True, shared=True)
        partial_bundle = bundle.with_name(f"{bundle.name}.partial")
        assemble(lowered, partial_bundle)
        self.manifest(target, build, lowered, calibrated, partial_bundle)
        proof = self.stage(parity, partial(self.prove, target, made, lowered, partial_bundle))
        for report in ("parity.json", "parity.html"):
            (partial_bundle / report).write_bytes((proof / report).read_bytes())
        self.manifest(target, build, lowered, calibrated, partial_bundle)
        self.work.publish(partial_bundle, bundle)
        self.failure_page(target).unlink(missing_ok=True)
        return bundle

    def failure_page(self, target: Target) -> Path:
        """Where the report of a target that failed parity is kept."""
        return self.config.output / f"{target.name}.failed-parity.html"

    def stage(self, name: str, run: Callable[[Path], None], resumes: bool = False, shared: bool = False) -> Path:
        """Run a planned stage unless it is done."""
        return self.work.run_stage(Stage(name, self.inputs[name], run, resumes, shared))

    def kernels(self, target: Target) -> Path | None:
        """The object file of our kernels for the target's processor; None for a backend that brings its own."""
        arch = kernel_arch(target)
        return None if arch is None else self.kernels_for(arch)

    def kernels_for(self, arch: str) -> Path:
        """Stage `kernels-*`: our kernels for one architecture, built once for all of its targets."""

        def compile_kernels(folder: Path) -> None:
            from arriero.export.compile.build_kernels import build_kernels

            self.watch(f"compile kernels for {arch}", 0, 1, "architectures")
            build_kernels(arch, folder / "kernels.o")
            self.watch(f"compile kernels for {arch}", 1, 1, "architectures")

        return self.stage(f"kernels-{arch}", compile_kernels) / "kernels.o"

    def trace(self, folder: Path) -> None:
        """Stage `graph`: the canonical ONNX graphs, weights linked from the checkpoint, invariants checked."""
        from arriero.graphs import check, trace

        for number, part in enumerate(self.parts):
            self.watch("trace", number, len(self.parts), "graphs")
            model = getattr(trace, f"trace_{part}")(self.model, self.checkpoint, folder / f"{part}.onnx")
            check.check(part, model, self.model)
        self.watch("trace", len(self.parts), len(self.parts), "graphs")

    def calibrate(self, folder: Path) -> None:
        """Stage `calibrate`: tokens per expert, ranges, and the roundings of every profile that calibrates."""
        from arriero.export.calibration.calibrate import Calibration
        from arriero.export.proof.reference import open_reference
        from arriero.export.proof.walk_layers import Walk

        samples = draw_cases(self.config.calibration, self.config.modalities)
        reference = open_reference(self.config.model, self.model.vision is None)
        profiles = {rounding_folder(profile): profile for profile in calibrating(self.profiles)}
        walk = Walk(reference, samples, folder, second=any(profile.rounds_by_gptq for profile in profiles.values()))
        if any(target.kv_cache == "int8" for target in self.config.targets):
            check_tokens(walk.tokens)
        coverage = Calibration(walk, self.checkpoint, profiles, folder, self.watch).run()
        write_part(CalibratedPart(describe_set(self.config.calibration, samples), coverage), folder)

    def lower(self, target: Target, made: Made, folder: Path) -> None:
        """Stage `lower-*`: the backend's graphs and weights, the tokenizer, and proof that the backend loads them."""
        profile, cache = self.decided(target, made.calibrated), self.cache_scales(target, made.calibrated)
        found = self.roundings(target, made.calibrated)
        weights = self.lower_parts(target, self.parts, profile, found, cache, made.graph, folder)
        copy_tokenizer(self.config.model, folder / "tokenizer")
        compiled = self.compile(target, self.parts, made.kernels, folder)
        if compiled.gpu is not None:  # an engine has swallowed the file of its part's weights
            weights = {name: {**one, "file": f"{Path(one['file']).stem}.engine"} for name, one in weights.items()}
        stored = {name: StoredWeight(**one) for name, one in weights.items()}
        write_part(LoweredPart(stored, compiled), folder)

    def compile(self, target: Target, parts: tuple[str, ...], kernels: Path | None, folder: Path) -> Compiled:
        """Make of the lowered graphs in `folder` what the backend loads."""
        compiler = import_module(f"arriero.export.compile.{TRAITS[target.backend].module}")
        gpu = target_gpu(target)
        device = Device(
            cpu=target.cpu,
            kernels=kernels,
            gpu=gpu,
            limits=Limits(target.context, target.batch, self.model.text.chunk),
            memory=self.plan.gpu_share(target.name) if gpu is not None else None,
        )

        def watch(step: str, done: int, total: int, unit: str) -> None:
            self.watch(f"{target.name}: {step}", done, total, unit)

        compiled: Compiled = compiler.compile_graphs(folder, parts, device, watch)
        return compiled

    def cache_scales(self, target: Target, calibrated: Path) -> list[CacheScales] | None:
        """Each layer's scales where the target keeps keys and values in int8."""
        if target.kv_cache != "int8":
            return None
        return cache_scales(json.loads((calibrated / "cache.json").read_text()))

    def lower_parts(
        self,
        target: Target,
        parts: tuple[str, ...],
        profile: Profile,
        roundings: QuantizedWeights | None,
        cache: list[CacheScales] | None,
        graph: Path,
        folder: Path,
    ) -> dict[str, Any]:
        """Write the backend's form of `parts` under `profile` into `folder`; give the manifest's weight table."""
        import onnx_ir as ir

        from arriero.graphs.check import part_tensors
        from arriero.graphs.lower.part import Lowering

        lowering = import_module(f"arriero.graphs.lower.{TRAITS[target.backend].module}")
        schemes = profile.assign([name for part in self.parts for name in part_tensors(part, self.model)])
        weights: dict[str, Any] = {}
        gpu = target_gpu(target)
        capability = 0 if gpu is None else gpu.capability
        for part in parts:

            def told(done: int, total: int, step: str = f"{target.name}: write {part} weights") -> None:
                self.watch(step, done, total, "bytes")

            given = Lowering(self.model, self.checkpoint, schemes, folder, told, roundings, cache, capability)
            weights |= lowering.lower(part, ir.load(graph / f"{part}.onnx"), given)
        return weights

    def manifest(self, target: Target, build: Mapping[str, str], lowered: Path, calibrated: Path, bundle: Path) -> None:
        """Write the bundle's manifest from the parts that the stages wrote."""
        stages = {"graph": self.work.folder("graph", build["graph"]), "calibrate": calibrated, "lower": lowered}
        records = {name: read_record(folder) for name, folder in stages.items()}
        text = self.model.text
        per_layer = 2 * text.kv_heads * text.head_dim * cache_bytes(target, self.profiles[target.profile])
        kinds = sorted({"chunked" if layer.chunked else "global" for layer in text.layers})
        parts = Parts(
            model=model_spec(self.model),
            target=target.model_dump(),
            tools={name: version for name, version in self.inputs["graph"]["tools"].items() if version},
            lowered=read_part(LoweredPart, lowered),
            calibrated=read_part(CalibratedPart, calibrated),
            rounded=self.rounded(target, calibrated),
            kv_bytes_per_token=dict.fromkeys(kinds, per_layer),
            measured=Measured(
                peak_memory_bytes=max(record["peak_memory_bytes"] for record in records.values()),
                seconds={name: record["seconds"] for name, record in records.items()},
            ),
        )
        write_manifest(bundle, parts, self.content, self.profile_digest(target), build)

    def rounded(self, target: Target, calibrated: Path) -> RoundedPart:
        """What calibration says of the target's profile: what it chose, and the experts that fell back."""
        from arriero.export.calibration.calibrate import fallbacks
        from arriero.export.calibration.choice import read_choice

        roundings = self.roundings(target, calibrated)
        return RoundedPart(
            fallback=fallbacks(self.profiles[target.profile], roundings.notes()), choice=read_choice(roundings.folder)
        )

    def roundings(self, target: Target, calibrated: Path) -> QuantizedWeights:
        """What calibration found for the target's profile."""
        return QuantizedWeights(calibrated / rounding_folder(self.profiles[target.profile]))

    def decided(self, target: Target, calibrated: Path) -> Profile:
        """The target's profile, with the choice that calibration made where it leaves one."""
        from arriero.export.calibration.choice import decided

        return decided(self.profiles[target.profile], self.roundings(target, calibrated).folder)

    def profile_digest(self, target: Target) -> str:
        """The profile's own hash in the chain."""
        return key_of("profile", self.profiles[target.profile].model_dump(mode="json"))

    def prove(self, target: Target, made: Made, lowered: Path, bundle: Path, folder: Path) -> None:
        """Stage `parity-*`: the bundle against the reference and, if its profile calibrates, against its RTN baseline.

        Raises `BelowThreshold`; the report page stays.
        """
        from arriero.export.proof.prove import measure
        from arriero.export.proof.rtn_baseline import with_rtn_baseline
        from arriero.runtimes.proof.report import write_html, write_json

        self.check_gpu(target, lowered)
        limits = thresholds(self.config, target, self.profiles[target.profile])
        report = measure(bundle, self.judge, limits, self.watch)
        report = with_rtn_baseline(report, self.rtn_kl(target, made, lowered, folder), limits)
        write_json(report, folder / "parity.json")
        write_html(report, folder / "parity.html")
        if report.failed:
            page = self.failure_page(target)
            write_html(report, page)
            raise BelowThreshold(
                f"target {target.name} is below its parity thresholds: {', '.join(row.title for row in report.failed)}",
                where=str(page),
                remedy="The page shows where it differs; choose a finer profile, or lower the threshold knowingly",
            )

    def check_gpu(self, target: Target, lowered: Path) -> None:
        """Stop a target whose engines this machine cannot run: they are compiled and kept, and not proven yet."""
        gpu = target_gpu(target)
        if gpu is None or gpu in local_gpus():
            return
        raise UnprovenHere(target.name, gpu, lowered)

    def rtn_kl(self, target: Target, made: Made, lowered: Path, folder: Path) -> float | None:
        """Mean KL of the RTN baseline of the target's profile on the parity cases; None if the profile is that form.

        Its key/value cache is the target's own: it is the weights' calibration that is judged.
        """
        from arriero.export.proof.rtn_baseline import measure_rtn_baseline

        profile = self.decided(target, made.calibrated)
        if profile.calibration is None:
            return None
        step = f"{target.name}: measure the RTN baseline"
        cache = self.cache_scales(target, made.calibrated)

        def lower_text(rtn: Path) -> None:
            parts: tuple[str, ...] = ("text",)
            chosen, objects = target, made.kernels
            if kernel_arch(target) not in (None, architecture()):
                # What rounding costs is the same on every processor, so a foreign target's is measured on this one.
                parts, chosen = self.parts, target.model_copy(update={"cpu": NATIVE})
                objects = self.kernels_for(architecture())
            self.lower_parts(chosen, parts, profile.rtn_baseline(), None, cache, made.graph, rtn)
            self.compile(chosen, parts, objects, rtn)

        return measure_rtn_baseline(
            self.judge.reference,
            target.backend,
            lowered,
            lower_text,
            self.judge.cases,
            folder,
            lambda done, total: self.watch(step, done, total, "samples"),
        )
