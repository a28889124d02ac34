"""Who is to blame for a KL: values that were rounded, or tokens that went to other experts for it.

Two more runs over the forced ids of the cases tell. One is the candidate's, each token sent to the reference's experts:
its KL is what rounding of values alone costs, the rest of the ordinary KL what flipped routing costs. The other is that
of an exact model, each token sent to the candidate's experts: its KL is what the candidate's routing alone costs. The
two need not add up to the whole. An expert's score is in either case the one that the running model's own router gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from arriero.runtimes.backend import Floats, Ints
from arriero.runtimes.proof.cases import ReferenceCase
from arriero.runtimes.proof.logits import KlSums, LogitFigures
from arriero.runtimes.proof.sampling_error import mean_error, ratio_error, told
from arriero.runtimes.proof.value import Value
from arriero.runtimes.steps import forces_routing

if TYPE_CHECKING:
    from arriero.runtimes.session import Session

FORCED_KL, ROUTING_SHARE, CANDIDATE_ROUTING_KL = (
    "logits_kl_forced_routing",
    "logits_kl_routing_share",
    "logits_kl_candidate_routing",
)


@dataclass
class GivenRouting:
    """The KL of all cases in a run of `session`, whose tokens are sent to experts that another side chose."""

    session: Session
    near_tie: float
    kl: KlSums = field(default_factory=KlSums)
    token_kl: list[NDArray[np.float64]] = field(default_factory=list)  # of each case

    @property
    def why_not(self) -> str | None:
        """Why the session cannot be given any experts; None where it can."""
        if forces_routing(self.session.backend):
            return None
        return "the graphs take no expert ids: those of dense models, for GPUs and of older builds do not"

    def run(self, case: ReferenceCase, pixels: Floats | None, expert_ids: Mapping[int, Ints]) -> int:
        """Add a case, its tokens sent to `expert_ids` [S, k] of each MoE layer; give how many logits are not finite."""
        meter, bad = case.logits.meter(self.near_tie), 0
        for logits in self.session.forced_logits(case.fed_ids, pixels, expert_ids):
            meter.add(logits)
            bad += int(logits.size - np.isfinite(logits).sum())
        figures: LogitFigures = meter.figures()
        self.kl += figures.kl
        self.token_kl.append(figures.token_kl)
        return bad

    def value(self) -> Value:
        """The mean KL over all tokens."""
        if self.why_not is not None:
            return Value(None, self.why_not)
        cases = len(self.token_kl)
        detail = f"{self.kl.tokens} tokens" + told(mean_error(self.token_kl), cases, "nat")
        return Value(self.kl.mean, detail, self.kl.error)

    def share_of(self, kl: KlSums, token_kl: list[NDArray[np.float64]]) -> Value:
        """What part of the ordinary `kl`, `token_kl` of each case, this run does not have.

        The errors of both KLs add up as if they were independent; they are of the same drawn ids, so the share is known
        better than that.
        """
        if self.why_not is not None:
            return Value(None, self.why_not)
        if not kl.mean:
            return Value(0.0, "there is no KL")
        left, error = self.kl.mean / kl.mean, 0.0
        if left and (kl.error or self.kl.error):
            error = abs(left) * float(np.hypot(kl.error / kl.mean, self.kl.error / self.kl.mean))
        over = ratio_error([one.sum() for one in self.token_kl], [one.sum() for one in token_kl])
        detail = f"{kl.mean:.3g} nat, {self.kl.mean:.3g} with routing forced" + told(over, len(token_kl), "share")
        return Value(1.0 - left, detail, error)
