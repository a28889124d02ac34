"""What bundles would do under a cap on memory: hit rate and tokens per second, from shapes, a trace and this machine.

Legend: E experts, k experts per token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from arriero.errors import ArrieroError
from arriero.export.build_file.model_spec import model_spec
from arriero.export.build_file.schema import BuildConfig
from arriero.export.machine.read_speed import ReadSpeed, measure_read_speed
from arriero.export.pipeline.cache_plan import cache_bytes
from arriero.export.pipeline.estimate_needs import is_used, stored_size
from arriero.export.pipeline.fitted_profiles import fitted_profiles
from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.config import ModelConfig, TextConfig
from arriero.graphs.names import EMBEDDING, expert_tensors
from arriero.graphs.sources.weight_source import WeightSource
from arriero.graphs.stored.safetensors_writer import ALIGNMENT
from arriero.profiles.recipe import Profile
from arriero.runtimes.backend import MemoryCap
from arriero.runtimes.memory_cap import RecordSize, share_memory, step_bytes
from arriero.runtimes.routing_trace import hit_rates, read_trace
from arriero.traits import TRAITS, BackendTraits

PROCESS = 60 << 20  # Python with the libraries that a bundle is opened with
# Of what all cores read from memory a decoded token reads so much, of a model whose steps take far longer than to begin
# them: 0.99 of Maverick at true width (docs/performance.md).
KERNEL_SHARE = 0.9


@dataclass(frozen=True)
class CappedTarget:
    """One target under a cap. Bytes of what every token reads, of all experts and of one's record in the largest layer;
    the fewest experts that a layer holds; what a token reads from the drive. `refused` says why it does not load.
    """

    name: str
    memory: int
    core: int
    experts: int
    record: int
    slots: int = 0
    of: int = 0
    hit_rate: float = 0.0
    read_per_token: float = 0.0
    tokens_per_second: float = 0.0
    refused: str | None = None


def foretell_capped(build: BuildConfig, memory: int, trace: Path | None) -> tuple[list[CappedTarget], ReadSpeed]:
    """Foretell every target that keeps to a cap of `memory` bytes; without a `trace` routing is taken to be uniform.

    Raises `ArrieroError` where no target does, and for a trace of another model.
    """
    capped = [target for target in build.targets if TRAITS[target.backend].no_cap is None]
    if not capped:
        reasons = {target.backend: TRAITS[target.backend].no_cap for target in build.targets}
        what = "; ".join(f"{backend}: {reason}" for backend, reason in reasons.items())
        raise ArrieroError(f"no target keeps to a cap on memory: {what}", where="targets", remedy="Leave --memory out")
    checkpoint = Checkpoint.open(build.model, build.adapters)
    config, profiles = checkpoint.model_config(), fitted_profiles(build, checkpoint)
    used = [info for info in checkpoint.tensors.values() if is_used(info, build, checkpoint)]
    rates = uniform_rates(config.text) if trace is None else trace_rates(config.text, trace)
    speed = measure_read_speed(build.output)
    foretold = []
    for target in capped:
        cap = MemoryCap(memory, target.context, target.batch)
        item = cache_bytes(target, profiles[target.profile])
        weights = StoredWeights.of(config.text, used, profiles[target.profile], TRAITS[target.backend])
        foretold.append(foretell(target.name, cap, weights, config, rates, speed, item))
    return foretold, speed


@dataclass(frozen=True)
class StoredWeights:
    """Bytes of a bundle's weights: the core, without the embedding's table, of which a token reads a row in its file;
    one record of each layer with experts, and the shared expert of each.
    """

    core: int
    records: tuple[int, ...]
    shared: tuple[int, ...]

    @classmethod
    def of(
        cls, text: TextConfig, used: Iterable[WeightSource], profile: Profile, traits: BackendTraits
    ) -> StoredWeights:
        """Those of the tensors `used` under `profile`, as a backend with such `traits` has them."""
        infos = {info.name: info for info in used}
        schemes = profile.assign(infos)
        sizes = {name: stored_size(info, schemes[name], profile, traits)[1] for name, info in infos.items()}
        stacks = [expert_tensors(layer) for layer in text.moe_layers]
        pools = [sum(sizes.pop(name) for name in names) for names in stacks]
        shared = [_sum_under(sizes, names[0].replace(".experts.gate_up_proj", ".shared_expert.")) for names in stacks]
        records = tuple(-(-pool // text.experts // ALIGNMENT) * ALIGNMENT for pool in pools)
        table = sizes.pop(EMBEDDING)
        head = table if text.tied_embeddings else 0  # the head is a copy
        return cls(sum(sizes.values()) + head, records, tuple(shared))


def _sum_under(sizes: Mapping[str, int], prefix: str) -> int:
    return sum(size for name, size in sizes.items() if name.startswith(prefix))


def uniform_rates(text: TextConfig) -> list[Sequence[float]]:
    """Of each layer with experts, the share of choices that 1, 2, .. E slots hold where all are as likely."""
    return [[(slots + 1) / text.experts for slots in range(text.experts)] for _ in text.moe_layers]


def trace_rates(text: TextConfig, trace: Path) -> list[Sequence[float]]:
    """The same as a trace has it. Raises `ArrieroError` for one of another model."""
    rates = hit_rates(read_trace(trace), text.experts)
    if sorted(rates) != sorted(text.moe_layers):
        what = f"the trace is of a model whose layers {_list(rates)} have experts"
        raise ArrieroError(what, where=str(trace), expected=_list(text.moe_layers))
    return [rates[layer] for layer in text.moe_layers]


def _list(layers: Iterable[int]) -> str:
    return ", ".join(map(str, layers))


def foretell(
    name: str,
    cap: MemoryCap,
    weights: StoredWeights,
    config: ModelConfig,
    rates: Sequence[Sequence[float]],
    speed: ReadSpeed,
    item_bytes: int,
) -> CappedTarget:
    """What a bundle of `weights` does within `cap` on a machine of such `speed`; `item_bytes` as in `share_memory`."""
    text, spec = config.text, model_spec(config)
    layers = [RecordSize(text.experts, record) for record in weights.records]
    core, largest = weights.core, max(weights.records, default=0)
    target = CappedTarget(name, cap.nbytes, core, text.experts * sum(weights.records), largest, of=text.experts)
    step = partial(step_bytes, spec, max(text.expert_ffn, text.dense_ffn))
    try:
        slots = share_memory(cap, PROCESS, core, layers, spec, step, item_bytes).slots
    except ArrieroError as error:
        return replace(target, refused=str(error))
    held = [rate[count - 1] for rate, count in zip(rates, slots, strict=True)]
    missed = [text.experts_per_token * (1 - rate) for rate in held]
    read = [misses * record for misses, record in zip(missed, weights.records, strict=True)]
    memory = KERNEL_SHARE * speed.memory
    # while an expert is read, the shared one is computed
    waits = [
        max(0.0, nbytes / speed.drive - min(1.0, misses) * shared / memory)
        for nbytes, misses, shared in zip(read, missed, weights.shared, strict=True)
    ]
    computing = (weights.core + text.experts_per_token * sum(weights.records)) / memory
    return replace(
        target,
        slots=min(slots, default=0),
        hit_rate=sum(held) / max(1, len(held)),
        read_per_token=sum(read),
        tokens_per_second=1 / (computing + sum(waits)),
    )
