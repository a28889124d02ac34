"""A figure of the parity report before it is judged."""

from __future__ import annotations

from dataclasses import dataclass

from arriero.runtimes.proof.paired import Pairs
from arriero.runtimes.proof.rows import Row, judge, judge_drop


@dataclass(frozen=True)
class Value:
    """A row before it is judged: value (None: not measured), what stands beside it, its standard error.

    `pairs` are what a drop of accuracy is judged by. What `applies` to no model of this shape is no row of the report.
    """

    value: float | None
    detail: str
    error: float = 0.0
    pairs: Pairs | None = None
    applies: bool = True

    def row(self, metric: str, threshold: float | None) -> Row:
        """The judged row."""
        if self.pairs is not None:
            return judge_drop(metric, self.pairs, threshold, self.detail)
        return judge(metric, self.value, threshold, self.detail, self.error)
