"""The parity report as data, and as JSON.

Files appear whole or not at all. Numbers that are not finite survive the round trip through JSON.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from arriero.errors import ArrieroError, is_full
from arriero.runtimes.manifest import Fallback
from arriero.runtimes.proof.paired import Pairs
from arriero.runtimes.proof.rows import Row
from arriero.strict_json import read_json_object
from arriero.thresholds import FORCED, REFERENCE_FLOOR, AnswerMode

FORMAT = 2
_AGAIN = "Run `arriero parity` again"
_LAYER_NUMBERS = ("relative_l2", "snr_db", "router_agreement")
_CASE_NUMBERS = ("logits_relative_l2", "logits_max_abs_error", "kl_mean", "greedy_prefix")


@dataclass(frozen=True)
class LayerSeries:
    """One decoder layer: error of the residual stream after it, and its router's agreement (None: dense)."""

    layer: int
    attention: str
    ffn: str
    relative_l2: float | None
    snr_db: float | None
    router_agreement: float | None
    near_ties: int
    near_tie_flips: int
    real_flips: int


@dataclass(frozen=True)
class FamilyScore:
    """Task scores of one family. `lost`: right on the reference only; `gained`: right on the candidate only."""

    family: str
    count: int
    reference_right: int
    candidate_right: int
    lost: int
    gained: int

    @property
    def pairs(self) -> Pairs:
        """What the drop of accuracy is judged by."""
        return Pairs(self.count, self.lost, self.gained)


@dataclass(frozen=True)
class CaseResult:
    """One case: teacher-forced figures and both answers. `right` is None where the case has no scorer.

    `logits_max_abs_error` is over the logits that the reference keeps. A forced answer ends where it leaves the
    expected one.
    """

    name: str
    family: str
    tokens: int
    image_tiles: int
    logits_relative_l2: float
    logits_max_abs_error: float
    kl_mean: float
    token_flips: int
    router_flips: int | None
    greedy_prefix: float
    expected: str
    reference_text: str
    candidate_text: str
    reference_right: bool | None
    candidate_right: bool | None


@dataclass(frozen=True)
class ParityReport:
    """All rows, the per-layer series, the families and the cases. `labels` are the caller's (bundle, profile, ...).

    `coverage`: tokens of each expert by MoE layer, of calibration or of the cases; `fallback`: the experts that too few
    of them reached; `synthetic`: whether the bundle's weights were drawn at random.
    """

    rows: tuple[Row, ...]
    layers: tuple[LayerSeries, ...]
    families: tuple[FamilyScore, ...]
    cases: tuple[CaseResult, ...]
    near_tie: float
    answers: AnswerMode  # how both sides answered: `generated` or `forced`
    labels: dict[str, str] = field(default_factory=dict)
    coverage: dict[int, tuple[int, ...]] = field(default_factory=dict)
    fallback: tuple[Fallback, ...] = ()
    synthetic: bool = False

    @property
    def failed(self) -> tuple[Row, ...]:
        """The rows that failed; empty, hence false, when the candidate passed."""
        return tuple(row for row in self.rows if row.status == "fail")

    @property
    def warnings(self) -> tuple[str, ...]:
        """What makes the proof say less than it seems to: synthetic weights, a reference that is hardly ever right."""
        if self.synthetic:
            return ("The weights are synthetic, drawn at random: answers mean nothing, right or wrong.",)
        count = sum(score.count for score in self.families)
        right = sum(score.reference_right for score in self.families)
        if not count or right >= REFERENCE_FLOOR * count:
            return ()
        metric = "task_accuracy_reference"
        metric = FORCED[metric] if self.answers == "forced" else metric
        return (
            f"The reference itself answers {right} of {count} cases right, so equal answers may be equal mistakes: "
            "check the checkpoint's chat template and tokenizer, and that the set's answers are what the model should "
            f"say; a threshold on {metric} makes this fail.",
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as strict JSON values; infinities and NaN become the strings "inf", "-inf" and "nan"."""
        values = {"format": FORMAT, "passed": not self.failed, "warnings": list(self.warnings)}
        return values | _plain(asdict(self))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str | None = None) -> ParityReport:
        """The report that `to_dict` wrote. Raises ArrieroError, naming `where`, when `data` is not one."""
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            number = data.get("format") if isinstance(data, Mapping) else type(data).__name__
            what = f"not a parity report of format {FORMAT} (found {number!r})"
            raise ArrieroError(what, where=where, remedy=_AGAIN)
        try:
            return cls(
                rows=tuple(Row(**_numbers(row, "value", "threshold", "error")) for row in data["rows"]),
                layers=tuple(LayerSeries(**_numbers(layer, *_LAYER_NUMBERS)) for layer in data["layers"]),
                families=tuple(FamilyScore(**family) for family in data["families"]),
                cases=tuple(CaseResult(**_numbers(case, *_CASE_NUMBERS)) for case in data["cases"]),
                near_tie=float(data["near_tie"]),
                answers=data["answers"],
                labels=dict(data["labels"]),
                # reports from before they said so do not
                coverage={int(layer): tuple(counts) for layer, counts in data.get("coverage", {}).items()},
                fallback=tuple(Fallback(**entry) for entry in data.get("fallback", ())),
                synthetic=bool(data.get("synthetic", False)),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ArrieroError(f"the parity report is damaged ({error})", where=where, remedy=_AGAIN) from error


def write_json(report: ParityReport, path: Path) -> None:
    """Write the report as JSON, indented, keys in a fixed order; the same report gives the same bytes."""
    write_text(path, json.dumps(report.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> ParityReport:
    """Read what `write_json` wrote. Raises ArrieroError when the file is missing or is no parity report."""
    return ParityReport.from_dict(read_json_object(path, _AGAIN), str(path))


def write_text(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all. Raises ArrieroError where it cannot be written.

    What is no file, such as /dev/stdout, is written to; behind a link the file is replaced and the link stays.
    """
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
            return
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        if is_full(error):  # the path is not what is wrong
            raise
        raise _unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Refuse a path that `write_text` could not write, before the work that would be reported there."""
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.exists() and not path.is_file():
            return
        write_nothing(path.parent)
    except OSError as error:
        raise _unwritable(path, error) from error


def write_nothing(folder: Path) -> None:
    """Make `folder` and a file in it that is gone at once. Raises OSError where that cannot be."""
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


def _unwritable(path: Path, error: OSError) -> ArrieroError:
    what, remedy = f"the report cannot be written ({error.strerror})", "Give a path that can be written"
    return ArrieroError(what, where=str(path), remedy=remedy)


def _plain(value: Any) -> Any:
    """`value` with tuples as lists, and floats that JSON cannot hold as strings."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _numbers(data: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {key: float(item) if key in names and item is not None else item for key, item in data.items()}
