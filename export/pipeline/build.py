"""The build on one page: checkpoint, graph, calibration, reference record, then per target lowering, compilation,
parity, publication.

Every step is a content-keyed stage (`stages.py`), so that a killed build goes on where it stopped and an unchanged one
does nothing. A bundle appears under its name only after its parity passed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arriero.export.build_file.hash_checkpoint import hash_checkpoint
from arriero.export.build_file.schema import BuildConfig
from arriero.export.compile import Watch, no_watch
from arriero.export.machine.jobs import Submit, Told, do_here
from arriero.export.machine.versions import installed_versions
from arriero.export.pipeline.explain_failure import thin_experts
from arriero.export.pipeline.fitted_profiles import fitted_profiles
from arriero.export.pipeline.lower_ahead import Lowerings
from arriero.export.pipeline.parts import read_part, write_part
from arriero.export.pipeline.plan import make_plan
from arriero.export.pipeline.record_plan import answer_mode
from arriero.export.pipeline.results import TargetResult
from arriero.export.pipeline.stage_keys import calibrating, is_shared, rounding_folder, stage_inputs
from arriero.export.pipeline.stages import Run, Stage, WorkDir, key_of, machine_limits, read_record, subject_stage
from arriero.export.pipeline.target_build import TargetBuild
from arriero.export.samples.cases import describe_set, draw_cases
from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.config import ModelConfig
from arriero.graphs.sources.content_hash import is_damaged
from arriero.graphs.sources.runtime_adapters import RuntimeAdapters
from arriero.profiles.journal import Tell, keep_silent
from arriero.profiles.kv_cache import check_tokens
from arriero.profiles.recipe import Profile
from arriero.runtimes.manifest import CalibratedPart
from arriero.runtimes.proof.record import ReferenceRecord
from arriero.traits import SHARED_PACKAGES

if TYPE_CHECKING:
    from arriero.graphs.check import Part


class Build:
    """One build file at work."""

    def __init__(
        self,
        config: BuildConfig,
        file: str,
        watch: Watch,
        dump: Path | None = None,
        tell: Tell = keep_silent,
        submit: Submit = do_here,
    ) -> None:
        """Prepare to build `config`, read from `file`; `watch` sees its progress, `dump` is to keep its graphs.

        `tell` is given what is worth a sentence before the end. `submit` has jobs done that other processes can do.
        """
        self.config, self.file, self.watch, self.dump, self.tell = config, file, watch, dump, tell
        self.submit, self.lowerings = submit, Lowerings(submit)
        self.targets: list[TargetBuild] = []
        self.work = WorkDir(config.output, config.budgets.host_memory, watch, tell)
        self.results: list[TargetResult] = []
        self._failed: dict[str, Exception] = {}
        self._records: dict[str | None, ReferenceRecord] = {}

    def __getstate__(self) -> dict[str, Any]:
        """The build for a worker: what was decided and finished, without those who watch."""
        dump = None if self.dump is None else self.dump.absolute()
        silent = Build(self.config, self.file, no_watch, dump, Told())
        known = ("plan", "content", "contents", "inputs", "profiles", "graph", "calibrated")
        return vars(silent) | {name: vars(self)[name] for name in known if name in vars(self)}

    @cached_property
    def profiles(self) -> dict[str, Profile]:
        """The profiles of the targets, by the names that the build file has for them."""
        return fitted_profiles(self.config, self.checkpoint)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint's headers."""
        return Checkpoint.open(self.config.model, self.config.adapters)

    @cached_property
    def adapted(self) -> dict[str, Checkpoint]:
        """The checkpoint with each of the runtime adapters merged, by the adapter's name."""
        return {name: self.checkpoint.merged([folder]) for name, folder in self.config.runtime_adapters.items()}

    @cached_property
    def runtime_adapters(self) -> RuntimeAdapters:
        """The factors of those adapters, between which the text graphs of all targets switch."""
        return RuntimeAdapters.read(self.checkpoint.tensors, self.config.runtime_adapters)

    @cached_property
    def model(self) -> ModelConfig:
        """The model as far as the build's modalities need it."""
        return self.checkpoint.model_config().taking(self.config.modalities)

    @cached_property
    def record(self) -> ReferenceRecord:
        """What every target is judged by; written with the first that is."""
        return self.record_of(None)

    def record_of(self, adapter: str | None) -> ReferenceRecord:
        """The same for the model with a runtime adapter."""
        if adapter not in self._records:
            write = partial(self.write_record, adapter)
            stage = self.stage(subject_stage("reference", adapter), write, resumes=True)
            self._records[adapter] = ReferenceRecord.open(stage)
        return self._records[adapter]

    @property
    def parts(self) -> tuple[Part, ...]:
        """The graphs of a bundle."""
        return ("embed", "text") if self.model.vision is None else ("embed", "vision", "text")

    @cached_property
    def graph(self) -> Path:
        """The finished stage `graph`."""
        return self.stage("graph", self.trace)

    @cached_property
    def calibrated(self) -> Path:
        """The finished stage `calibrate`; what it means for the profiles is told at once."""
        folder = self.stage("calibrate", self.calibrate, resumes=True)
        coverage = read_part(CalibratedPart, folder).coverage
        for profile in calibrating(self.profiles):
            thin = thin_experts(profile, coverage) or "every expert had enough calibration tokens"
            self.tell(f"calibration for profile {profile.name}: {thin}")
        return folder

    def run(self) -> list[TargetResult]:
        """Build every target, one whatever became of another; `results` has those that are behind at any time.

        Raises `ArrieroError` with what stops all of them before the first.
        """
        self.watch("plan", 0, 0, "")
        plan = self.plan = make_plan(self.config)
        plan.check(self.file)
        with self.at_work():
            self.targets = [TargetBuild(self, target) for target in self.config.targets]
            for target in self.targets:
                self.results.append(target.run())
                if isinstance(stop := self.results[-1].error, KeyboardInterrupt):
                    raise stop
            self.work.bundles.prune(target.name for target in self.config.targets)
            self.work.prune((name, self.key(name)) for name in self.inputs)
        return self.results

    def run_calibration(self) -> dict[str, Any]:
        """Run the stage `calibrate` alone and describe what it saw. A later `run` of the build file takes it over."""
        from arriero.export.calibration.coverage import describe_calibration

        self.watch("plan", 0, 0, "")
        plan = make_plan(self.config, only=("calibrate",))
        plan.check(self.file)
        with self.at_work():
            folder = self.calibrated
            planned = None if plan.done else plan.stages[0].memory
            part = read_part(CalibratedPart, folder)
            return describe_calibration(folder, part, read_record(folder), calibrating(self.profiles), planned)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Hold the output folder; within, what every stage depends on is known."""
        with machine_limits("before the first stage", self.config.output), self.work.locked():
            memo = self.work.hash_memo
            if is_damaged(memo):
                self.tell(f"{memo}: it is not as it was written; every file of the checkpoint is hashed again")
            self.content = hash_checkpoint(self.checkpoint, self.watch, memo)
            self.contents = {
                adapter: hash_checkpoint(one, self.watch, memo, adapter) for adapter, one in self.adapted.items()
            }
            self.inputs = stage_inputs(self.config, self.checkpoint, self.content, self.profiles, self.contents)
            yield
            self.checkpoint.remember_links(memo)

    def key(self, name: str) -> str:
        """The key of a planned stage."""
        return key_of(name, self.inputs[name])

    def is_done(self, name: str) -> bool:
        """Whether a planned stage is finished."""
        return self.work.is_done(name, self.key(name))

    def stage(self, name: str, run: Run, resumes: bool = False) -> Path:
        """Run a planned stage unless it is done. One that failed is not tried again for the next target."""
        if name in self._failed:
            raise self._failed[name]
        try:
            return self.work.run_stage(Stage(name, self.inputs[name], run, resumes, is_shared(name)))
        except Exception as error:
            self._failed[name] = error
            raise

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

    def calibrate(self, folder: Path) -> set[str]:
        """Stage `calibrate`: tokens per expert, ranges, and the roundings of every profile that calibrates."""
        from arriero.export.calibration.calibrate import Calibration
        from arriero.export.proof.reference import open_reference
        from arriero.export.proof.walk_layers import Walk

        self.watch("calibrate: draw and encode samples", 0, 0, "")
        samples = draw_cases(self.config.calibration, self.config.modalities)
        reference = open_reference(self.checkpoint, self.model.vision is None)
        profiles = {rounding_folder(profile): profile for profile in calibrating(self.profiles)}
        second = any(profile.rounds_by_gptq for profile in profiles.values())
        walk = Walk(reference, samples, folder, second, tell=self.tell)
        if any(target.kv_cache == "int8" for target in self.config.targets):
            check_tokens(walk.tokens)
        calibration = Calibration(walk, self.checkpoint, profiles, folder, self.watch, self.submit, self.tell)
        part = CalibratedPart(describe_set(self.config.calibration, samples), calibration.run())
        return calibration.files() | {write_part(part, folder)}

    def write_record(self, adapter: str | None, folder: Path) -> set[str]:
        """Stage `reference`: what the PyTorch reference says of the parity cases; no target runs it again.

        With `adapter` it is the reference of the checkpoint that has it merged.
        """
        from arriero.export.proof.reference import open_reference
        from arriero.export.proof.write_record import Origin, write_record

        self.watch("reference record: draw and encode cases", 0, 0, "")
        parity = self.config.parity
        cases = draw_cases(parity.cases, self.config.modalities)
        origin = Origin(
            checkpoint=self.content if adapter is None else self.contents[adapter],
            modalities=self.config.modalities,
            answers=answer_mode(self.config),
            set=asdict(describe_set(parity.cases, cases)),
            tools=installed_versions(SHARED_PACKAGES),
        )
        checkpoint = self.checkpoint if adapter is None else self.adapted[adapter]
        reference = open_reference(checkpoint, self.model.vision is None)
        return write_record(reference, cases, origin, folder, self.watch, self.tell)
