"""What a plan says: the stages, the bundles to be, and whether they fit what the build file and the machine give."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from arriero.errors import ArrieroError, raise_together
from arriero.export.compile import MemoryBudget
from arriero.export.machine.budget import check_budget
from arriero.traits import TRAITS

UNDOABLE = "the build cannot be done"
FLOATS = ("f32", "bf16", "f16")  # labels of weights that are not quantised
SCRATCH_SHARE = 8  # of a GPU's budget beside the cache, one in this many bytes is left to compute in at least


@dataclass(frozen=True)
class PlannedStage:
    """A stage of the build; `key` is None while the checkpoint has not been hashed yet.

    `memory` and `disk` are estimates, in bytes, of what it takes to do it, done or not; `seconds` how long it takes on
    this machine, None for what is done.
    """

    name: str
    key: str | None
    done: bool
    memory: int
    disk: int
    seconds: float | None = None


@dataclass(frozen=True)
class PlannedTarget:
    """A bundle to be: bytes of its weights by scheme, and of the KV cache at its full context and batch.

    `device` is what it is compiled for: an architecture of processors or of GPUs, "any" for a backend that compiles
    for none.
    """

    name: str
    backend: str
    device: str
    profile: str
    context: int
    batch: int
    kv_cache: str
    weights: dict[str, int]
    weights_bytes: int
    kv_bytes: int
    quantised: dict[str, int]  # how many tensors that the checkpoint quantises are kept, made exact, rounded anew
    done: bool

    @property
    def on_gpu(self) -> bool:
        """Whether it is compiled for a GPU."""
        return TRAITS[self.backend].compiles_for == "gpu"

    @property
    def is_exact(self) -> bool:
        """Whether nothing in the bundle is quantised."""
        return set(self.weights) <= set(FLOATS)

    @property
    def bytes(self) -> int:
        """Weights and cache together: what a device holds, beside scratch space."""
        return self.weights_bytes + self.kv_bytes

    @property
    def copied(self) -> int:
        """Bytes that publishing takes on disk: weights in ONNX files are a bundle's own, others are linked."""
        return self.weights_bytes if TRAITS[self.backend].is_onnx and not self.done else 0


@dataclass(frozen=True)
class Plan:
    """Everything `arriero plan` says. Sizes in bytes; memory and disk are estimates of what is still to be done."""

    model: dict[str, Any]
    reference: dict[str, Any]  # how answers are made, where the record goes, and its bytes at most
    stages: tuple[PlannedStage, ...]
    targets: tuple[PlannedTarget, ...]
    context_prices: tuple[dict[str, Any], ...]
    memory_available: int | None
    memory_budget: int | None
    disk_available: int
    disk_budget: int | None
    gpu_budget: int | None
    warnings: tuple[str, ...]
    problems: tuple[ArrieroError, ...]  # what would stop the build, beside too little memory or disk

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return all(stage.done for stage in self.stages)

    @property
    def peak_memory(self) -> int:
        """Bytes of memory that the hungriest stage still to be done takes."""
        return max((stage.memory for stage in self.stages if not stage.done), default=0)

    @property
    def gpu_memory(self) -> int:
        """Bytes of weights and cache of the largest target for a GPU; scratch space comes on top."""
        return max((target.bytes for target in self.targets if target.on_gpu), default=0)

    @property
    def disk(self) -> int:
        """Bytes of disk that all stages still to be done take together, and the bundles that they are for."""
        taken = {stage.name: stage.disk for stage in self.stages if not stage.done}
        for lower, baseline in ((f"lower-{target.name}", f"rtn-{target.name}") for target in self.targets):
            if lower in taken and baseline in taken:  # a baseline is gone before the bundle's own weights are written
                taken[lower] = max(taken[lower], taken.pop(baseline))
        names = {stage.name for stage in self.stages}
        copied = sum(target.copied for target in self.targets if f"lower-{target.name}" in names)
        return sum(taken.values()) + copied

    @property
    def seconds(self) -> float:
        """The estimated time of all stages still to be done."""
        return sum(stage.seconds or 0.0 for stage in self.stages if not stage.done)

    def only(self, *names: str) -> Plan:
        """The plan of these stages alone."""
        return replace(self, stages=tuple(stage for stage in self.stages if stage.name in names))

    def check(self, file: str) -> None:
        """Refuse a plan that cannot be carried out, for all of its problems and what it needs beyond its budgets."""
        raise_together([*self.problems, *self._over_budget(file)], f"{file}: {UNDOABLE}")

    def check_budgets(self, file: str) -> None:
        """Refuse a plan that needs more memory or disk than the build file `file` or the machine gives it."""
        raise_together(self._over_budget(file), f"{file}: {UNDOABLE}")

    def _over_budget(self, file: str) -> list[ArrieroError]:
        """What needs more than the build file `file` or the machine gives it."""
        asked = [
            ("memory", self.peak_memory, self.memory_budget, self.memory_available, "host_memory"),
            ("disk space", self.disk, self.disk_budget, self.disk_available, "disk"),
        ]
        for target in self.targets:
            if target.on_gpu and not target.done:  # weights that a GPU has no room for stay with the host
                asked.append(("GPU memory", target.kv_bytes, self.gpu_budget, None, "gpu_memory"))
        problems = []
        for what, needed, budget, available, key in asked:
            try:
                check_budget(what, needed, budget=budget, available=available, where=f"{file}: budgets.{key}")
            except ArrieroError as error:
                problems.append(error)
        return problems

    def gpu_share(self, name: str) -> MemoryBudget | None:
        """What the GPU's budget leaves the engines of target `name` beside its cache; None without a budget."""
        if self.gpu_budget is None:
            return None
        target = next(target for target in self.targets if target.name == name)
        left = self.gpu_budget - target.kv_bytes
        least = left // SCRATCH_SHARE
        fits = left - target.weights_bytes >= least
        return MemoryBudget(left - target.weights_bytes) if fits else MemoryBudget(least, left - least)

    def to_json(self) -> dict[str, Any]:
        """Give the plan as JSON values."""
        entries = {**asdict(self), "problems": [str(problem) for problem in self.problems]}
        return {
            **entries,
            "peak_memory": self.peak_memory,
            "disk": self.disk,
            "seconds": self.seconds,
            "done": self.done,
        }
