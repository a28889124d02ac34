"""The page that stays beside the bundles of a target that failed its parity, marked as ours in its last line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from arriero.errors import ArrieroError

if TYPE_CHECKING:
    from arriero.export.pipeline.results import Failure
    from arriero.runtimes.proof.report import ParityReport

MARK = "<!-- a failed parity of `arriero build`, which replaces this page -->\n"


@dataclass(frozen=True)
class FailurePage:
    """Where the page of one target is, there or not."""

    path: Path

    @classmethod
    def of(cls, output: Path, target: str) -> Self:
        """That of a target whose bundle goes into the folder `output`."""
        return cls(output / f"{target}.failed-parity.html")

    def write(self, report: ParityReport, failures: Sequence[Failure]) -> None:
        """Keep the page of a report, with what is known of its failures."""
        from arriero.runtimes.proof.pages import render_html
        from arriero.runtimes.proof.report import write_text

        write_text(self.path, render_html(report, [*map(str, failures)]) + MARK)

    def remove(self) -> None:
        """Delete the page, if it is ours."""
        if self._is_ours():
            self.path.unlink()

    def problems(self) -> list[ArrieroError]:
        """What is in its place and not ours."""
        if self._is_ours() or not (self.path.exists() or self.path.is_symlink()):
            return []
        what = "is where the page of a failed parity goes, and no build made it"
        return [ArrieroError(what, where=str(self.path), remedy="Move it away, or rename the target")]

    def _is_ours(self) -> bool:
        try:
            return self.path.read_text(encoding="utf-8").endswith(MARK)
        except (OSError, ValueError):
            return False
