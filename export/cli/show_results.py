"""What a build made of its targets: a table for people, JSON and JUnit XML for machines, written whatever happened."""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from arriero.errors import ArrieroError, exit_code_of, sentence_of
from arriero.export.cli.tables import print_rows
from arriero.export.pipeline.results import TargetResult, worst_code
from arriero.export.pipeline.stages import split_stage

if TYPE_CHECKING:
    from rich.console import Console

    from arriero.export.build_file.schema import BuildConfig

STYLES = {"published": "green", "up to date": "green", "unproven": "yellow"}


@dataclass
class Outcome:
    """A build so far: results of the targets that are behind, and what stopped all the others, if anything did."""

    file: str
    require_proof: bool
    config: BuildConfig | None = None
    results: list[TargetResult] = field(default_factory=list)
    error: BaseException | None = None

    @property
    def targets(self) -> list[TargetResult]:
        """The result of every target, those that were never begun with what stopped the build."""
        if self.config is None:
            return []
        begun = {result.name: result for result in self.results}
        return [
            begun.get(one.name) or TargetResult(one.name, self.config.output / one.name, "not built", error=self.error)
            for one in self.config.targets
        ]

    @property
    def exit_code(self) -> int:
        """The build's exit code."""
        if isinstance(self.error, ArrieroError):
            return max(self.error.exit_code, worst_code(self.results))
        if self.error is not None:
            return exit_code_of(self.error)
        return worst_code(self.targets, self.require_proof)

    def to_json(self) -> dict[str, Any]:
        """The outcome as JSON values."""
        return {
            "bundles": [str(one.folder) for one in self.targets if one.published],
            "unproven": {str(one.folder): one.device for one in self.targets if one.state == "unproven"},
            "targets": [one.to_json() for one in self.targets],
            "error": None if self.error is None else sentence_of(self.error),
            "exit_code": self.exit_code,
        }

    def write(self, junit: Path | None, json_file: Path | None) -> None:
        """Write both files that were asked for."""
        from arriero.runtimes.proof.junit import Suite, write_junit
        from arriero.runtimes.proof.report import write_text

        if json_file is not None:
            write_text(json_file, json.dumps(self.to_json(), indent=1) + "\n")
        if junit is None:
            return
        suites = [
            Suite(
                name=one.name,
                reports=one.reports,
                seconds=one.seconds,
                causes={(why.adapter, why.metric): f"{why.cause}: {why.remedy}" for why in one.failures},
                error=sentence_of(one.error) if one.error and not one.failures else None,
                unproven=_advice(one) if one.state == "unproven" else None,
            )
            for one in self.targets
        ]
        if not suites:
            suites = [Suite(name=self.file, error=None if self.error is None else sentence_of(self.error))]
        write_junit(suites, junit)


def show_outcome(outcome: Outcome, out: Console | None, err: Console) -> None:
    """Print what stopped each target, each cause once, and the table of all targets.

    That somebody stopped the build is for others to say.
    """
    told: list[BaseException] = []
    for one in outcome.targets:
        if one.error is None or any(one.error is error for error in told):
            continue
        told.append(one.error)
        if isinstance(one.error, KeyboardInterrupt):
            continue
        if not isinstance(one.error, ArrieroError):
            err.print(escape("".join(traceback.format_exception(one.error))), highlight=False, soft_wrap=True)
        said = f"{one.name}: {sentence_of(one.error)}"
        err.print(f"[bold red]error:[/] {escape(said)}", highlight=False, soft_wrap=True)
    if out is None:
        return
    rows = [(one.name, _stages(one.stages), f"{one.seconds:.1f} s", _result(one)) for one in outcome.targets]
    print_rows(out, ("target", "stages", "time", "result"), rows)
    for one in outcome.targets:
        if one.published:
            state = "published, unproven" if one.state == "unproven" else "published"
            line = f"[{STYLES[one.state]}]{state}[/] {escape(str(one.folder))}"
            out.print(line, highlight=False, soft_wrap=True)
        if one.state == "unproven":
            out.print(f"  {escape(_advice(one))}", highlight=False, soft_wrap=True)
        if one.stands:
            out.print(f"unchanged {escape(str(one.folder))}, of an earlier build", highlight=False, soft_wrap=True)
        for warning in one.warnings:
            out.print(f"  [yellow]warning:[/] {escape(warning)}", highlight=False, soft_wrap=True)
    if outcome.require_proof and any(one.state == "unproven" for one in outcome.targets):
        err.print("[bold red]error:[/] --require-proof: a bundle is not proven", highlight=False)


def _advice(one: TargetResult) -> str:
    return f"run `arriero parity {one.folder}` on {one.device}: it measures the bundle there"


def _result(one: TargetResult) -> str:
    if one.failures:
        return "; ".join(failure.measured for failure in one.failures)
    if isinstance(one.error, KeyboardInterrupt):
        return "stopped" if one.stages else "not begun"
    return one.state if one.error is None else f"{one.state}, exit code {one.exit_code}"


def _stages(stages: Mapping[str, float | None]) -> str:
    ran = [f"{_kind(name)} {seconds:.1f} s" for name, seconds in stages.items() if seconds is not None]
    return ", ".join(ran) or ("all done before" if stages else "none")


def _kind(stage: str) -> str:
    """What a stage does, without the target that it does it for: `parity`, and `parity with german` for an adapter."""
    name, adapter = split_stage(stage)
    return name.partition("-")[0] + (f" with {adapter}" if adapter else "")
