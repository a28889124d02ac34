"""How long each stage takes on this machine: its arithmetic and bytes at the measured speed, and what Python adds.

Rough on purpose, within a factor of about three: it tells a minute from an hour.
Legend: T tokens of all samples, K input and N output features of a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from arriero.export.calibration.estimate import Size, head_schemes
from arriero.export.machine.speed import MachineSpeed
from arriero.export.pipeline.planned import PlannedTarget
from arriero.export.pipeline.stages import split_stage
from arriero.graphs.config import ModelConfig
from arriero.graphs.names import EMBEDDING, HEAD, TEXT_PREFIX
from arriero.graphs.sources.weight_source import WeightSource
from arriero.profiles.groups import is_layer_matrix
from arriero.profiles.moments import FEW
from arriero.profiles.recipe import Profile
from arriero.traits import TRAITS

# Seconds on a machine of 2 cores, rounded up from runs on small models; `benchmarks/plan_accuracy.py` prints builds'.
TOOLS = 2.0  # to load what lowers and proves
TRACER = 6.0  # to load what traces
TRACED_LAYER = 1.1  # of the decoder and of the tower
COMPILED_LAYER = 1.5  # by TVM
KERNELS = 40.0  # a file of C++ for each level of instructions, two at a time
STEP = 0.002  # of Python and PyTorch for a layer and a sample
EFFICIENCY = 0.4  # of the measured product that small and ragged ones reach
LARGE = 0.8  # and that of whole matrices, a panel at a time
SEARCH = 2500  # operations for each number whose scale is searched and that is rounded by itself
INTEGERS = 2.5  # times as fast as products of floats that those of rounded weights are on a processor
# Bytes that are copied in the time that a number takes to be read, rounded to nearest and packed, or packed alone.
NEAREST, PACKED = 42, 17


@dataclass(frozen=True)
class Work:
    """What the stages of a build go over."""

    config: ModelConfig
    used: Sequence[WeightSource]
    samples: Sequence[Size]
    cases: Sequence[Size]
    answered: int  # tokens of all answers that are generated
    profiles: Sequence[Profile]  # that calibrate
    forced_routing: bool = False  # a target's cases run once more where its backend can

    @property
    def layers(self) -> float:
        """Parameters of the decoder's layers that one token is multiplied by."""
        text = self.config.text
        share = text.experts_per_token / text.experts if text.moe_layers else 1.0
        return sum(
            math.prod(one.shape) * (share if len(one.shape) == 3 else 1)
            for one in self.used
            if is_layer_matrix(one.name)
        )

    @property
    def head(self) -> float:
        """Those of the head; an embedding is looked up."""
        return self.config.text.vocab_size * self.config.text.hidden_size

    @property
    def rounded(self) -> int:
        """Numbers that a bundle rounds where its profile rounds any."""
        return sum(math.prod(one.shape) for one in self.used if len(one.shape) > 1 and one.name != EMBEDDING)

    def pass_seconds(self, sizes: Sequence[Size], parameters: float, speed: MachineSpeed) -> float:
        """The samples once through so many `parameters` of the decoder, and their pictures through the tower."""
        flops = 2.0 * parameters * sum(size[0] for size in sizes)
        vision = self.config.vision
        if vision is not None:
            tower = sum(math.prod(one.shape) for one in self.used if not one.name.startswith(TEXT_PREFIX))
            flops += 2.0 * tower * (vision.grid**2 + 1) * sum(size[1] for size in sizes)
        return flops / (speed.flops * EFFICIENCY) + STEP * len(sizes) * len(self.config.text.layers)

    def answer_seconds(self, bytes_per_weight: float, speed: MachineSpeed) -> float:
        """The cases answered token by token, each of which reads the active weights."""
        read = (self.layers + self.head) * bytes_per_weight
        return self.answered * (read / speed.copied + STEP * len(self.config.text.layers))


def estimate_seconds(
    names: Iterable[str], work: Work, targets: Sequence[PlannedTarget], speed: MachineSpeed
) -> dict[str, float]:
    """Seconds of each of the stages `names`."""
    layers, stored = work.config.layers, sum(one.nbytes for one in work.used)
    proof = work.pass_seconds(work.cases, work.layers + work.head, speed)
    observed = work.pass_seconds(work.samples, work.layers, speed)
    seconds = {
        "graph": TRACER + TRACED_LAYER * layers,
        "calibrate": TOOLS + observed + _rounding(work, speed) + stored / speed.copied,
        "reference": TOOLS + proof + stored / speed.copied + work.answer_seconds(2, speed),
    }
    for target in targets:
        write = (4 * stored + target.weights_bytes) / speed.copied + 2 * target.weights_bytes / speed.hashed
        rounded = 0 if target.is_exact else work.rounded
        packed, nearest = (rounded * copied / speed.copied for copied in (PACKED, NEAREST))
        if TRAITS[target.backend].compiles_for == "cpu":
            write += COMPILED_LAYER * layers
        calibrated = target.profile in {profile.name for profile in work.profiles}
        seconds[f"lower-{target.name}"] = TOOLS + write + (packed if calibrated else nearest)
        each = target.weights_bytes / max(1, sum(math.prod(one.shape) for one in work.used))
        runs = 1 + (work.forced_routing and TRAITS[target.backend].forces_routing and bool(work.config.text.moe_layers))
        integers = not target.is_exact and TRAITS[target.backend].compiles_for == "cpu"
        once = proof / INTEGERS if integers else proof
        seconds[f"parity-{target.name}"] = TOOLS + runs * once + work.answer_seconds(each, speed)
        seconds[f"rtn-{target.name}"] = TOOLS + write + nearest + once
    # with an adapter a stage takes as long as without
    return {name: KERNELS if name.startswith("kernels-") else seconds[split_stage(name)[0]] for name in names}


def _rounding(work: Work, speed: MachineSpeed) -> float:
    """What is factored of every matrix's inputs, and the sweep over its columns, for each profile."""
    gptq = [profile for profile in work.profiles if profile.rounds_by_gptq]
    if not gptq:
        return 0.0
    tokens = sum(size[0] for size in work.samples)
    heads = len(head_schemes(gptq, work.used))
    flops = 0.0
    for one in work.used:
        forms = len(gptq) if is_layer_matrix(one.name) else heads if one.name == HEAD else 0
        if forms:
            experts = one.shape[0] if len(one.shape) == 3 else 1
            inputs, outputs = (one.shape[1], one.shape[2]) if len(one.shape) == 3 else (one.shape[1], one.shape[0])
            rows = tokens * (work.config.text.experts_per_token / experts if experts > 1 else 1)
            # factors are made in float64, which counts twice
            if rows * FEW <= inputs:
                factor, passed_on = 8 * rows**2 * inputs, 4 * rows * inputs * outputs
            else:
                factor, passed_on = rows * inputs**2 + 4 / 3 * inputs**3, outputs * inputs**2
            flops += experts * (factor + forms * (passed_on + SEARCH * inputs * outputs))
    return flops / (speed.flops * LARGE)
