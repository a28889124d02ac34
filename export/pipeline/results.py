"""What a build made of each of its targets, and the exit code of all of them together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from arriero.errors import MachineLacks, exit_code_of, sentence_of
from arriero.runtimes.manifest import FILE

if TYPE_CHECKING:
    from arriero.runtimes.proof.report import ParityReport

State = Literal["published", "up to date", "unproven", "failed", "not built"]


@dataclass(frozen=True)
class Failure:
    """A row below its threshold: value and limit as people read them, why, and what to do.

    It is of the model itself, or of it with `adapter`.
    """

    metric: str
    title: str
    value: str
    limit: str
    cause: str
    remedy: str
    adapter: str | None = None

    @property
    def measured(self) -> str:
        """What was measured, its value and its limit."""
        worn = "" if self.adapter is None else f" with {self.adapter}"
        return f"{self.title}{worn} {self.value}, limit {self.limit}"

    def __str__(self) -> str:
        return f"{self.measured}; {self.cause}: {self.remedy}"


@dataclass(frozen=True)
class TargetResult:
    """One target. `device` is what can prove it where this machine could not; `error` is what stopped it.

    `stages` holds the seconds that each stage took in this build, None for one that was done before. `reports` are
    those of the model, None, and of it with each runtime adapter.
    """

    name: str
    folder: Path
    state: State
    seconds: float = 0.0
    stages: Mapping[str, float | None] = field(default_factory=dict)
    device: str | None = None
    failures: Sequence[Failure] = ()
    reports: Mapping[str | None, ParityReport] = field(default_factory=dict)
    error: BaseException | None = None

    @property
    def published(self) -> bool:
        """Whether the bundle lies under its name as the build file asks for it."""
        return self.state in ("published", "up to date", "unproven")

    @property
    def exit_code(self) -> int:
        """What the target alone would make the build return."""
        return 0 if self.error is None else exit_code_of(self.error)

    @property
    def stands(self) -> bool:
        """Whether a bundle of an earlier build lies under the name."""
        return not self.published and (self.folder / FILE).is_file()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What makes its proof say less than it seems to, each once."""
        return tuple(dict.fromkeys(warning for report in self.reports.values() for warning in report.warnings))

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {
            "name": self.name,
            "bundle": str(self.folder),
            "state": self.state,
            "exit_code": self.exit_code,
            "seconds": round(self.seconds, 3),
            "stages": dict(self.stages),
            "device": self.device,
            "earlier_bundle": self.stands,
            "failures": [vars(one) for one in self.failures],
            "warnings": list(self.warnings),
            "error": None if self.error is None else sentence_of(self.error),
        }


def worst_code(results: Sequence[TargetResult], require_proof: bool = False) -> int:
    """The exit code of a build: the highest of its targets' codes."""
    codes = [result.exit_code for result in results]
    if require_proof:
        codes += [MachineLacks.exit_code for result in results if result.state == "unproven"]
    return max(codes, default=0)
