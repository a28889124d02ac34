"""What bundles would do under a cap on memory: hit rate and tokens per second, from shapes, a trace and this machine.

Legend: E experts, k experts per token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from arriero.errors import ArrieroError
from arriero.export.build_file.model_spec import model_spec
from arriero.export.build_file.schema import BuildConfig
from arriero.export.machine.read_speed import ReadSpeed, measure_read_speed
from arriero.export.pipeline.estimate_needs import is_used
from arriero.export.pipeline.fitted_profiles import fitted_profiles
from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.config import TextConfig
from arriero.graphs.names import EMBEDDING, expert_tensors
from arriero.profiles.recipe import Profile
from arriero.profiles.schemes import Exact
from arriero.runtimes.backend import MemoryCap
from arriero.runtimes.memory_cap import RecordSize, share_memory, step_bytes
from arriero.runtimes.routing_trace import hit_rates, read_trace
from arriero.traits import TRAITS

PROCESS = 60 << 20  # Python with the libraries that a bundle is opened with
PAGE = 4096
# Of what all cores read from memory, our kernels decode at so much: see docs/performance.md.
KERNEL_SHARE = 0.7


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
    text, profiles = checkpoint.model_config().text, fitted_profiles(build, checkpoint)
    rates = _rates(text, trace)
    speed = measure_read_speed(build.output)
    return [
        _foretell(
            target.name,
            MemoryCap(memory, target.context, target.batch),
            _Weights.of(build, checkpoint, profiles[target.profile]),
            checkpoint,
            rates,
            speed,
        )
        for target in capped
    ], speed


@dataclass(frozen=True)
class _Weights:
    """Bytes of a bundle's weights: the embedding's table, of which a token reads a row, the rest of the core, one
    record of each layer with experts, and the shared expert of each.
    """

    table: int
    core: int
    records: tuple[int, ...]
    shared: tuple[int, ...]

    @classmethod
    def of(cls, build: BuildConfig, checkpoint: Checkpoint, profile: Profile) -> _Weights:
        """Those of the bundle under `profile`."""
        schemes, text = profile.assign(checkpoint.tensors), checkpoint.model_config().text
        sizes: dict[str, int] = {}
        for info in checkpoint.tensors.values():
            if is_used(info, build, checkpoint):
                stays = isinstance(schemes[info.name], Exact) and len(info.shape) > 1
                sizes[info.name] = info.nbytes if stays else schemes[info.name].stored_bytes(info.shape)
        stacks = [expert_tensors(layer) for layer in text.moe_layers]
        pools = [sum(sizes.pop(name) for name in names) for names in stacks]
        shared = [_sum_under(sizes, names[0].replace(".experts.gate_up_proj", ".shared_expert.")) for names in stacks]
        records = tuple(-(-pool // text.experts // PAGE) * PAGE for pool in pools)
        table = sizes.pop(EMBEDDING)
        return cls(table, sum(sizes.values()), records, tuple(shared))


def _sum_under(sizes: Mapping[str, int], prefix: str) -> int:
    return sum(size for name, size in sizes.items() if name.startswith(prefix))


def _rates(text: TextConfig, trace: Path | None) -> list[Sequence[float]]:
    """Of each layer with experts, the share of choices that 1, 2, .. E slots hold."""
    uniform = [(slots + 1) / text.experts for slots in range(text.experts)]
    if trace is None:
        return [uniform for _ in text.moe_layers]
    rates = hit_rates(read_trace(trace), text.experts)
    if sorted(rates) != sorted(text.moe_layers):
        layers = _list(rates)
        raise ArrieroError(
            f"the trace is of a model whose layers {layers} have experts",
            where=str(trace),
            expected=_list(text.moe_layers),
        )
    return [rates[layer] for layer in text.moe_layers]


def _list(layers: Iterable[int]) -> str:
    return ", ".join(map(str, layers))


def _foretell(
    name: str,
    cap: MemoryCap,
    weights: _Weights,
    checkpoint: Checkpoint,
    rates: Sequence[Sequence[float]],
    speed: ReadSpeed,
) -> CappedTarget:
    config = checkpoint.model_config()
    text, spec = config.text, model_spec(config)
    layers = [RecordSize(text.experts, record) for record in weights.records]
    pool = text.experts * sum(weights.records)
    core = weights.table + weights.core
    described = CappedTarget(name, cap.nbytes, core, pool, max(weights.records, default=0), of=text.experts)
    width = max(text.expert_ffn, text.dense_ffn)
    try:
        share = share_memory(cap, PROCESS, core, layers, spec, partial(step_bytes, spec, width))
    except ArrieroError as error:
        return CappedTarget(**{**vars(described), "refused": str(error)})
    reading, read, hits = 0.0, 0.0, []
    for record, shared, slots, rate in zip(weights.records, weights.shared, share.slots, rates, strict=True):
        hits.append(rate[slots - 1])
        missed = text.experts_per_token * (1 - hits[-1]) * record
        read += missed
        # the shared expert is computed meanwhile
        hidden = (1 - hits[-1]) * shared / (KERNEL_SHARE * speed.memory)
        reading += max(0.0, missed / speed.drive - hidden)
    computing = (weights.core + text.experts_per_token * sum(weights.records)) / (KERNEL_SHARE * speed.memory)
    return CappedTarget(
        **{
            **vars(described),
            "slots": min(share.slots, default=0),
            "hit_rate": sum(hits) / max(1, len(hits)),
            "read_per_token": read,
            "tokens_per_second": 1 / (computing + reading),
        }
    )
