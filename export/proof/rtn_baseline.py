"""A calibrated bundle against its own RTN baseline: what calibration is worth, measured before the bundle may ship."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from arriero.graphs.stored.link_file import link_file
from arriero.runtimes.api import open_backend
from arriero.runtimes.processor.processor import Processor
from arriero.runtimes.proof.metrics import kl_per_token
from arriero.runtimes.proof.report import ParityReport, Row, judge
from arriero.runtimes.session import Session
from arriero.thresholds import OVER_RTN

if TYPE_CHECKING:
    from arriero.runtimes.proof.parity import ParityCase


def measure_rtn_baseline(
    reference: Session,
    backend: str,
    lowered: Path,
    lower_text: Callable[[Path], object],
    cases: Sequence[ParityCase],
    folder: Path,
    progress: Callable[[int, int], None],
) -> float:
    """Mean KL over the tokens of `cases`, prompt and answer, of the RTN baseline: `lowered` with another text graph.

    `lower_text` writes that graph with its weights into the folder it is given, which lies in `folder` and is gone
    afterwards. The ids are the ones that parity forces through the calibrated form.
    """
    rtn = folder / "rtn"
    shutil.rmtree(rtn, ignore_errors=True)
    rtn.mkdir()
    lower_text(rtn)
    for file in sorted(lowered.rglob("*")):
        name = file.relative_to(lowered)
        if file.is_file() and name.parts[0] != "tokenizer" and not (rtn / name).exists():
            link_file(file, rtn / name)
    spec = reference.spec
    with Session(open_backend(backend, rtn, spec), Processor(lowered / "tokenizer", spec)) as session:
        kl = mean_kl(reference, session, cases, progress)
    shutil.rmtree(rtn)
    return kl


def mean_kl(
    reference: Session, candidate: Session, cases: Sequence[ParityCase], progress: Callable[[int, int], None]
) -> float:
    """Mean KL(reference || candidate) in nats over every token of prompt and answer of `cases`."""
    total, tokens = 0.0, 0
    for done, case in enumerate(cases, 1):
        prompt = reference.encode(case.prompt, list(case.images))
        ids = np.concatenate([prompt.input_ids, reference.processor.tokenize(case.answer)])
        left, right = (side.logits(ids, prompt.pixel_values).logits[0] for side in (reference, candidate))
        total, tokens = total + float(kl_per_token(left, right).sum()), tokens + len(ids)
        progress(done, len(cases))
    return total / tokens


def with_rtn_baseline(report: ParityReport, rtn_kl: float | None, thresholds: Mapping[str, float]) -> ParityReport:
    """`report` with the rows that say by how much it beats its RTN baseline, whose mean KL is `rtn_kl`.

    None: the profile does not calibrate, so it is its own RTN baseline and has nothing to beat. A threshold above 1
    counts as 1: what is worse than its RTN baseline does not ship.
    """
    if rtn_kl is None:
        return report
    kl = next(row.value for row in report.rows if row.metric == "logits_kl_mean")
    assert kl is not None
    over = kl / rtn_kl if rtn_kl > 0 else float(kl > 0)
    detail = f"calibrated {kl:.3g} nat, RTN {rtn_kl:.3g} nat: {1 / over:.3g} times closer" if over else "both exact"
    rows = (
        judge("rtn_kl_mean", rtn_kl, None, "the same tensors, bits and blocks, rounded to nearest"),
        judge(OVER_RTN, over, min(1.0, thresholds.get(OVER_RTN, 1.0)), detail),
    )
    return replace(report, rows=(*report.rows, *rows))


def recorded_rows(report: ParityReport) -> tuple[Row, ...]:
    """The rows of a recorded report that only a build can measure."""
    return tuple(row for row in report.rows if row.metric in (OVER_RTN, "rtn_kl_mean"))
