"""One target of a build: lowered, compiled, proven where this machine can, and published.

A target for another device than this machine is published all the same, without a proof and so marked; the device
completes it with `arriero parity`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arriero.errors import BelowThreshold
from arriero.export.build_file.device import kernel_arch, target_gpu
from arriero.export.build_file.model_spec import model_spec
from arriero.export.build_file.schema import Target
from arriero.export.compile import Device
from arriero.export.compile.cpus import NATIVE
from arriero.export.compile.nvidia.engine_shapes import Limits
from arriero.export.compile.nvidia.gpus import local_gpus
from arriero.export.pipeline.bundle import Parts, assemble, copy_licenses, copy_tokenizer, is_current, write_manifest
from arriero.export.pipeline.cache_plan import cache_bytes, graph_cache
from arriero.export.pipeline.explain_failure import explain_failures
from arriero.export.pipeline.failure_page import FailurePage
from arriero.export.pipeline.parts import read_part, write_part
from arriero.export.pipeline.place_record import is_placed, place_record
from arriero.export.pipeline.results import Failure, State, TargetResult
from arriero.export.pipeline.stage_keys import reads_calibration, rounding_folder
from arriero.export.pipeline.stages import Run, key_of, machine_limits, read_record, split_stage, subject_stage
from arriero.export.pipeline.target_thresholds import thresholds
from arriero.export.proof.emulate import can_emulate
from arriero.graphs.sources.synthetic import SyntheticModel
from arriero.profiles.kv_cache import StoredCache, cache_scales
from arriero.profiles.quantized_weights import QuantizedWeights
from arriero.profiles.recipe import Profile
from arriero.runtimes.cpu import architecture, lacking_features
from arriero.runtimes.manifest import (
    LICENSES,
    REPORTS,
    AdaptedPart,
    CalibratedPart,
    Compiled,
    FileRecord,
    LoweredPart,
    Manifest,
    Measured,
    ProofTerms,
    RoundedPart,
    RtnKl,
    Source,
    StoredWeight,
    proof_path,
)
from arriero.runtimes.proof.report import ParityReport, read_json
from arriero.thresholds import OVER_RTN
from arriero.traits import TRAITS

if TYPE_CHECKING:
    from arriero.export.pipeline.build import Build


OWN = ("lower-", "rtn-", "parity-")  # how the names of stages begin that one target has


class TargetBuild:
    """One target at work, within a `Build` that holds the output folder."""

    def __init__(self, build: Build, target: Target) -> None:
        self.build, self.target, self.profile = build, target, build.profiles[target.profile]
        self.bundle = build.config.output / target.name
        self.reports: dict[str | None, ParityReport] = {}
        self.failures: tuple[Failure, ...] = ()

    @property
    def device(self) -> str | None:
        """What this machine would have to be to run the lowered target; None where it can."""
        return self.device_with(read_part(LoweredPart, self.lowered).compiled.features)

    def device_with(self, features: Iterable[str]) -> str | None:
        """The same for a target that was compiled for a processor with `features`."""
        gpu, arch = target_gpu(self.target), kernel_arch(self.target)
        if gpu is not None and gpu not in local_gpus():
            return f"a machine with {gpu.description}"
        if arch not in (None, architecture()) and not can_emulate(str(arch)):
            return f"a machine with {arch} processors"
        if arch == architecture() and (lacking := lacking_features(features)):
            return f"a machine with {', '.join(lacking)}"
        return None

    @property
    def stages(self) -> dict[str, str]:
        """The stages that make the bundle, and their keys."""
        name = self.target.name
        names = ["graph", *["calibrate"] * self.reads_calibration, f"lower-{name}"]
        names += [
            subject_stage(stage, adapter) for stage in ("reference", f"parity-{name}") for adapter in self.subjects
        ]
        return {name: self.build.key(name) for name in names}

    @property
    def reads_calibration(self) -> bool:
        """Whether calibration decides what the target is made of."""
        return reads_calibration(self.target, self.build.profiles)

    @property
    def calibrated(self) -> CalibratedPart:
        """What is known of its experts' tokens: from calibration, or where there is none from the parity cases."""
        if self.reads_calibration:
            return read_part(CalibratedPart, self.build.calibrated)
        return CalibratedPart(None, self.build.record.tokens_per_expert())

    @property
    def subjects(self) -> tuple[str | None, ...]:
        """What is proven: the model itself, None, and with each of its runtime adapters."""
        return (None, *self.build.adapted)

    def run(self) -> TargetResult:
        """Lower, prove and publish; at once when the bundle is current. What stops it is in the result."""
        start, before = time.monotonic(), dict(self.build.work.ran)
        try:
            with machine_limits(f"while target {self.target.name} was put together", self.build.config.output):
                result = self._run()
        except BelowThreshold as error:
            result = TargetResult(
                self.target.name, self.bundle, "failed", failures=self.failures, reports=self.reports, error=error
            )
        # a fault of ours in one backend is no reason to leave the others out; who stops the build is told of this one
        except (Exception, KeyboardInterrupt) as error:
            result = TargetResult(self.target.name, self.bundle, "not built", error=error)
        own = [name for name in self.build.inputs if split_stage(name)[0].endswith(f"-{self.target.name}")]
        ran = self.build.work.ran
        stages = {name: ran.get(name) for name in own if name in ran or result.state != "up to date"}
        # a target that was got ready ahead has stages of its own in `ran`
        shared = {name: seconds for name, seconds in ran.items() if name not in before and not name.startswith(OWN)}
        return replace(result, seconds=time.monotonic() - start, stages={**shared, **stages})

    def _run(self) -> TargetResult:
        if is_current(self.bundle, self.stages) and is_placed(self.bundle, self.build.config.parity.record):
            manifest = Manifest.read(self.bundle)
            device = self.device_with(manifest.target.features)
            if manifest.proven or device is not None:
                self.failure_page.remove()
                self.build.watch(f"{self.target.name}: up to date", 1, 1, "bundles")
                if not manifest.proven:
                    return TargetResult(self.target.name, self.bundle, "unproven", device=device)
                for adapter in self.subjects:
                    self.reports[adapter] = read_json(self.bundle / proof_path(adapter, "parity.json"))
                return TargetResult(self.target.name, self.bundle, "up to date", reports=self.reports)
        lowered = self.lowered
        prepared = self.build.work.bundles.prepare(self.bundle)
        files = assemble(lowered, prepared, copied=TRAITS[self.target.backend].is_onnx)
        for adapter in self.subjects:
            record, place = self.build.record_of(adapter), self.build.config.parity.record
            files |= place_record(record, adapter, place, prepared, self.build.work)
        self.write_manifest(prepared, files)
        if self.device is None:
            proofs = {adapter: self.proof_of(adapter, prepared) for adapter in self.subjects}
            for adapter, proof in proofs.items():
                self.reports[adapter] = read_json(proof / "parity.json")
            self.judge()
            for adapter, proof in proofs.items():
                (prepared / proof_path(adapter)).mkdir(parents=True, exist_ok=True)
                for name in REPORTS:
                    (prepared / proof_path(adapter, name)).write_bytes((proof / name).read_bytes())
            self.write_manifest(prepared, files)
        self.build.work.bundles.publish(self.bundle)
        self.failure_page.remove()
        state: State = "published" if self.device is None else "unproven"
        return TargetResult(self.target.name, self.bundle, state, device=self.device, reports=self.reports)

    def proof_of(self, adapter: str | None, bundle: Path) -> Path:
        """The finished stage `parity-*` of the model with `adapter`, or of the model itself."""
        return self.stage("parity", partial(self.prove, adapter, bundle), adapter=adapter)

    def judge(self) -> None:
        """Raise `BelowThreshold` where rows failed; the first report with some stays beside the bundles as a page."""
        failed = {adapter: report for adapter, report in self.reports.items() if report.failed}
        if not failed:
            return
        self.failures = explain_failures(failed, self.profile, self.calibrated.coverage)
        self.failure_page.write(next(iter(failed.values())), self.failures)
        said = "\n".join(f"  {number}. {failure}" for number, failure in enumerate(self.failures, 1))
        worn = "" if None in failed else f"with adapter {', '.join(map(str, failed))} "
        raise BelowThreshold(f"{worn}below its parity thresholds; page {self.failure_page.path} has more:\n{said}")

    @property
    def failure_page(self) -> FailurePage:
        """The report of a target that failed parity."""
        return FailurePage.of(self.build.config.output, self.target.name)

    def stage(self, kind: str, run: Run, resumes: bool = False, adapter: str | None = None) -> Path:
        """Run one of the target's own stages unless it is done."""
        return self.build.stage(subject_stage(f"{kind}-{self.target.name}", adapter), run, resumes)

    @cached_property
    def lowered(self) -> Path:
        """The finished stage `lower-*`."""
        self.prepare_lowering()
        self.build.lowerings.ask_ahead(self.build.targets)
        return self.stage("lower", partial(self.build.lowerings.files, self), resumes=True)

    def prepare_lowering(self) -> None:
        """Finish the stages before the stage `lower-*`: those that it reads, as no stage runs within another, and the
        RTN baseline's, whose weights are gone before the bundle's own are written.
        """
        _ = self.build.graph, self.roundings, self.kernels, self.terms

    @property
    def is_lowered(self) -> bool:
        """Whether the stage `lower-*` is finished."""
        return self.build.is_done(f"lower-{self.target.name}")

    @property
    def may_be_lowered(self) -> bool:
        """Whether the stages that the stage `lower-*` reads are finished, and the bundle is to be made of it."""
        arch = kernel_arch(self.target)
        names = ["graph", *["calibrate"] * self.reads_calibration, *[f"kernels-{arch}"] * (arch is not None)]
        return all(map(self.build.is_done, names)) and not is_current(self.bundle, self.stages)

    @property
    def lowering_folder(self) -> Path:
        """Where the stage `lower-*` is made."""
        name = f"lower-{self.target.name}"
        return self.build.work.partial(name, self.build.key(name))

    @cached_property
    def kernels(self) -> Path | None:
        """The object file of our kernels for the target's processor; None for a backend that brings its own."""
        arch = kernel_arch(self.target)
        return None if arch is None else self.build.kernels_for(arch)

    @cached_property
    def native_kernels(self) -> Path | None:
        """The same for this machine's processor."""
        return None if self.kernels is None else self.build.kernels_for(architecture())

    @cached_property
    def roundings(self) -> QuantizedWeights | None:
        """What calibration found for the target's profile; None for a target that does not read it."""
        if not self.reads_calibration:
            return None
        return QuantizedWeights(self.build.calibrated / rounding_folder(self.profile))

    @cached_property
    def decided(self) -> Profile:
        """The target's profile, with the choice that calibration made where it leaves one."""
        from arriero.export.calibration.choice import decided

        return self.profile if self.roundings is None else decided(self.profile, self.roundings.folder)

    @property
    def cache(self) -> StoredCache:
        """How the target keeps keys and values."""
        kept = graph_cache(self.target, self.profile)
        if kept != "int8":
            return StoredCache(kept)
        return StoredCache(kept, cache_scales(json.loads((self.build.calibrated / "cache.json").read_text())))

    def lower(self, folder: Path) -> set[str]:
        """Stage `lower-*`: the backend's graphs and weights, tokenizer, licences, and proof that it loads them."""
        weights = self.lower_parts(self.target, self.build.parts, self.decided, self.roundings, folder)
        tokenizer = copy_tokenizer(self.build.checkpoint.side_folder, folder / "tokenizer")
        licenses = copy_licenses(self.build.checkpoint.license_files, folder / LICENSES)
        compiled = self.compile(self.target, self.build.parts, self.kernels, folder)
        if compiled.gpu is not None:  # an engine has swallowed the files of its part's weights
            for one in weights.values():
                one["files"] = sorted({_engine(file) for file in one["files"]})
        stored = {name: StoredWeight(**one) for name, one in weights.items()}
        code = {f"{part}{suffix}" for part in self.build.parts for suffix in TRAITS[self.target.backend].files}
        files = {file for weight in stored.values() for file in weight.files}
        return (
            code
            | files
            | {f"tokenizer/{name}" for name in tokenizer}
            | {f"{LICENSES}/{name}" for name in licenses}
            | {write_part(LoweredPart(stored, compiled), folder)}
        )

    def lower_parts(
        self,
        target: Target,
        parts: tuple[str, ...],
        profile: Profile,
        roundings: QuantizedWeights | None,
        folder: Path,
    ) -> dict[str, Any]:
        """Write the backend's form of `parts` for `target` under `profile` into `folder`; give the weight table."""
        import onnx_ir as ir

        from arriero.graphs.check import part_tensors
        from arriero.graphs.lower.dump import GraphDump
        from arriero.graphs.lower.part import Lowering

        build = self.build
        module = import_module(f"arriero.graphs.lower.{TRAITS[target.backend].module}")
        schemes = profile.assign([name for part in build.parts for name in part_tensors(part, build.model)])
        gpu = target_gpu(target)
        capability = 0 if gpu is None else gpu.capability
        dump = None if build.dump is None else GraphDump(build.dump / target.name)
        weights: dict[str, Any] = {}
        for part in parts:

            def progress(done: int, total: int, step: str = f"{target.name}: write {part} weights") -> None:
                build.watch(step, done, total, "bytes")

            build.watch(f"{target.name}: lower {part}", 0, 0, "")
            lowering = Lowering(
                *(build.model, build.checkpoint, schemes, folder, progress, roundings, self.cache, capability),
                *(dump, build.runtime_adapters, target.shard, build.tell),
            )
            weights |= module.lower(part, ir.load(build.graph / f"{part}.onnx"), lowering)
        return weights

    def compile(self, target: Target, parts: tuple[str, ...], kernels: Path | None, folder: Path) -> Compiled:
        """Make of the lowered graphs in `folder` what the backend loads."""
        compiler = import_module(f"arriero.export.compile.{TRAITS[target.backend].module}")
        gpu = target_gpu(target)
        device = Device(
            cpu=target.cpu,
            kernels=kernels,
            gpu=gpu,
            limits=Limits(target.context, target.batch, self.build.model.text.chunk),
            memory=self.build.plan.gpu_share(self.target.name) if gpu is not None else None,
        )

        def watch(step: str, done: int, total: int, unit: str) -> None:
            self.build.watch(f"{target.name}: {step}", done, total, unit)

        compiled: Compiled = compiler.compile_graphs(folder, parts, device, watch)
        return compiled

    @cached_property
    def terms(self) -> ProofTerms:
        """What the bundle is judged by: its thresholds, and the RTN baseline's KL, which only a build can measure."""
        limits = thresholds(self.build.config, self.target, self.profile)
        forced = self.build.config.parity.forced_routing
        if self.decided.calibration is None:
            return ProofTerms(limits, forced_routing=forced)
        gpu = target_gpu(self.target)
        if gpu is not None and gpu not in local_gpus():
            gone = {name: limit for name, limit in limits.items() if name != OVER_RTN}
            why = "the RTN baseline's engines run on the target's GPU alone"
            return ProofTerms(gone, unmeasured=why, forced_routing=forced)
        _ = self.build.graph, self.build.record, self.native_kernels
        return ProofTerms(limits, read_part(RtnKl, self.stage("rtn", self.measure_rtn)), forced_routing=forced)

    def measure_rtn(self, folder: Path) -> None:
        """Stage `rtn-*`: KL of the RTN baseline of the target's profile on the parity cases.

        Its key/value cache is the target's own: it is the weights' calibration that is judged. What rounding costs is
        the same on every processor, so it is measured on this one whatever the target is for.
        """
        from arriero.export.proof.rtn_baseline import measure_rtn_baseline

        step = f"{self.target.name}: measure the RTN baseline"

        def lower(rtn: Path) -> None:
            native = {"cpu": NATIVE} if kernel_arch(self.target) is not None else {}
            target = self.target.model_copy(update={"name": f"{self.target.name}-rtn", **native})
            self.lower_parts(target, self.build.parts, self.decided.rtn_baseline(), None, rtn)
            copy_tokenizer(self.build.checkpoint.side_folder, rtn / "tokenizer")
            self.compile(target, self.build.parts, self.native_kernels, rtn)

        kl = measure_rtn_baseline(
            self.build.record,
            self.target.backend,
            lower,
            folder,
            lambda done, total: self.build.watch(step, done, total, "samples"),
            self.build.config.budgets.host_memory,
        )
        write_part(RtnKl(kl.mean, kl.error), folder)

    def prove(self, adapter: str | None, bundle: Path, folder: Path) -> None:
        """Stage `parity-*`: the bundle against the reference record. A report that failed is a result as well.

        With `adapter` it answers with that, and the record is that of the checkpoint which has it merged.
        """
        from arriero.export.proof.measure_bundle import measure_bundle, own_terms
        from arriero.runtimes.proof.pages import write_html
        from arriero.runtimes.proof.report import write_json

        record, terms = self.build.record_of(adapter), self.terms if adapter is None else own_terms(self.terms)
        memory = self.build.config.budgets.host_memory
        report = measure_bundle(bundle, record, terms, record.labels(), self.build.watch, adapter, memory=memory)
        write_json(report, folder / "parity.json")
        write_html(report, folder / "parity.html")

    def write_manifest(self, bundle: Path, files: Mapping[str, FileRecord]) -> None:
        """Write the bundle's manifest from the parts that the stages wrote; `files` are those that they hashed."""
        build, stages = self.build, self.stages
        folders = {"graph": build.graph, "lower": self.lowered}
        if self.reads_calibration:
            folders["calibrate"] = build.calibrated
        records = {name: read_record(folder) for name, folder in folders.items()}
        text = build.model.text
        per_layer = 2 * text.kv_heads * text.head_dim * cache_bytes(self.target, self.profile)
        kinds = sorted({"chunked" if layer.chunked else "global" for layer in text.layers})
        parts = Parts(
            model=model_spec(build.model),
            source=self.source(),
            target=self.target.model_dump() | {"kv_cache": graph_cache(self.target, self.profile)},
            tools=build.inputs["graph"]["tools"],
            lowered=read_part(LoweredPart, self.lowered),
            calibrated=self.calibrated,
            rounded=self.rounded(),
            record=build.record.hash,
            proof=self.terms,
            adapters={name: AdaptedPart(build.contents[name], build.record_of(name).hash) for name in build.contents},
            kv_bytes_per_token=dict.fromkeys(kinds, per_layer),
            measured=Measured(
                peak_memory_bytes=max(record["peak_memory_bytes"] for record in records.values()),
                seconds={name: record["seconds"] for name, record in records.items()},
            ),
        )
        digest = key_of("profile", self.profile.model_dump(mode="json"))
        write_manifest(bundle, parts, files, build.content, digest, stages)

    def source(self) -> Source:
        """What the bundle is made of. A folder is named without the path to it, which is this machine's."""
        model, adapters = self.build.config.model, tuple(folder.name for folder in self.build.config.adapters)
        synthetic = isinstance(model, SyntheticModel)
        name = str(model) if isinstance(model, SyntheticModel) else model.name
        return Source(name, self.build.checkpoint.layout.name, adapters, synthetic)

    def rounded(self) -> RoundedPart:
        """What calibration says of the target's profile: what it chose, and the experts that fell back."""
        from arriero.export.calibration.calibrate import fallbacks
        from arriero.export.calibration.choice import read_choice

        if self.roundings is None:
            return RoundedPart(fallback=(), choice=None)
        fallback = fallbacks(self.profile, self.roundings.notes())
        return RoundedPart(fallback=fallback, choice=read_choice(self.roundings.folder))


def _engine(weights: str) -> str:
    """The engine that holds what was in a file of weights: that of the part which the file was numbered for."""
    return f"{Path(weights).stem.rpartition('-')[0]}.engine"
