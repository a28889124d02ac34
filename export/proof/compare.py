"""Bundles side by side: size, speed, and every quality figure against one checkpoint, on the same held-out prompts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arriero.errors import ArrieroError
from arriero.export.proof.against import check_origin, label_set, modalities_of, open_live
from arriero.export.proof.measure_bundle import circumstances, measure_bundle
from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.sources.synthetic import SyntheticModel
from arriero.graphs.stored.safetensors_writer import ITEM_BYTES
from arriero.runtimes.api import load
from arriero.runtimes.manifest import PROOFS, Manifest, ProofTerms, StoredWeight
from arriero.runtimes.proof import pages, plots
from arriero.runtimes.proof.metrics import accuracy_interval
from arriero.runtimes.proof.report import ParityReport, read_json
from arriero.sizes import human_bytes

if TYPE_CHECKING:
    from arriero.export.build_file.schema import Cases

Watch = Callable[[str, int, int, str], None]
SPEED_PROMPT, SPEED_TOKENS, SPEED_RUNS = "Count from one to one hundred.", 48, 3


@dataclass(frozen=True)
class Compared:
    """One bundle's line. Bytes are of files, without reference records; shares lie in [0, 1]; KL is the mean over
    tokens, in nats.

    `decoder_bits` are bits per weight of the decoder layers' matrices, scales counted, router and norms not;
    `kv_bytes_per_token` those of all layers.
    """

    bundle: str
    name: str
    backend: str
    profile: str
    bytes: int
    text_bytes: int
    decoder_bits: float
    kv_cache: str
    kv_bytes_per_token: int
    tokens_per_second: float
    logits_kl_mean: float | None
    logits_kl_standard_error: float | None
    logits_kl_forced_routing: float | None
    logits_kl_routing_share: float | None
    kl_over_rtn: float | None
    same_top_token: float | None
    router_agreement: float | None
    accuracy_reference: float | None
    accuracy: float | None
    accuracy_interval: tuple[float, float] | None
    cases: int


def compare_bundles(
    bundles: Sequence[Path],
    model: Path | SyntheticModel,
    adapters: Sequence[Path],
    wanted: Cases,
    threads: int | None,
    watch: Watch,
    forced_routing: bool = False,
) -> list[Compared]:
    """Measure each bundle against the checkpoint `model`, with the adapters that the build merged.

    With `forced_routing` once more with the reference's routing, where a bundle's graphs take it.

    Raises ArrieroError, before anything is measured, for a bundle of another checkpoint.
    """
    checkpoint = Checkpoint.open(model, adapters)
    manifests = [Manifest.read(bundle) for bundle in bundles]
    check_origin(manifests, checkpoint, watch)
    reference = cache(partial(open_live, checkpoint, wanted))
    lines = []
    for bundle, manifest in zip(bundles, manifests, strict=True):
        step = partial(watch, f"{manifest.name}: speed")
        speed = _tokens_per_second(bundle, threads, step)
        terms, sides = ProofTerms({}, forced_routing=forced_routing), reference(modalities_of(manifest))
        measured = measure_bundle(bundle, sides, terms, label_set(wanted), watch)
        lines.append(_line(bundle, manifest, measured, speed))
    return lines


def to_json(lines: Sequence[Compared], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The comparison as JSON values."""
    return {**settings, "bundles": [asdict(line) for line in lines]}


NOTES = (
    "Bits: per weight of the decoder layers' matrices, scales counted. KV cache: its type, and what one token takes in "
    "all layers together. Tokens/s: decoding one sequence, the best of three runs.",
    "Routing forced: mean KL with each token sent to the reference's experts, which --forced-routing measures. By "
    "routing: the share of the KL that is gone then.",
    "Of RTN: mean KL over that of the profile's own form without calibration, as the build measured it.",
    "Top token and Router: the share that agrees with the reference, its near ties apart.",
    "Accuracy: with Wilson's interval at 95 % confidence.",
)
HEADS = (
    "Bundle",
    "Profile",
    "Size",
    "Text",
    "Bits",
    "KV cache",
    "Tokens/s",
    "KL, nats",
    "Routing forced",
    "By routing",
    "Of RTN",
    "Top token",
    "Router",
    "Accuracy",
    "Reference",
)


def cells(line: Compared) -> tuple[str, ...]:
    """One line for people, in the order of `HEADS`."""

    def share(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.2f} %"

    accuracy = "–"
    if line.accuracy is not None and line.accuracy_interval is not None:
        low, high = (100 * edge for edge in line.accuracy_interval)
        accuracy = f"{100 * line.accuracy:.1f} % ({low:.1f} to {high:.1f})"
    kl = "–" if line.logits_kl_mean is None else f"{line.logits_kl_mean:.3g}"
    if line.logits_kl_standard_error is not None:
        kl += f" ± {line.logits_kl_standard_error:.1g}"
    return (
        line.name,
        line.profile,
        human_bytes(line.bytes),
        human_bytes(line.text_bytes),
        f"{line.decoder_bits:.2f}",
        f"{line.kv_cache}, {human_bytes(line.kv_bytes_per_token)}/token",
        f"{line.tokens_per_second:.1f}",
        kl,
        "–" if line.logits_kl_forced_routing is None else f"{line.logits_kl_forced_routing:.3g}",
        share(line.logits_kl_routing_share),
        share(line.kl_over_rtn),
        share(line.same_top_token),
        share(line.router_agreement),
        accuracy,
        share(line.accuracy_reference),
    )


def write_page(lines: Sequence[Compared], labels: Mapping[str, str], path: Path) -> None:
    """Write the comparison as a self-contained HTML page with a plot of quality against size.

    What was measured, when and where stands in its header, beside `labels`.
    """
    labels = {**circumstances({line.backend for line in lines}), **labels}
    points = {line.name: (line.bytes / 2**20, line.logits_kl_mean) for line in lines if line.logits_kl_mean is not None}
    plot = plots.size_and_error(points)
    pages.write_page(
        path, "Bundles compared", labels, HEADS, [cells(line) for line in lines], NOTES, [plot] if plot else []
    )


def decoder_bytes(weights: Mapping[str, StoredWeight], of_experts: float = 1) -> int:
    """Bytes of the text decoder's weights in a manifest's weight table, the embedding table not counted.

    `of_experts` is the share of the experts' that counts: k of E, where what one token reads is asked for.
    """
    return round(
        sum(
            prod(entry.shape) * ITEM_BYTES[entry.dtype] * (of_experts if ".experts." in name else 1)
            for name, entry in weights.items()
            if name.startswith("language_model.") and "embed_tokens" not in name
        )
    )


def decoder_bits(weights: Mapping[str, StoredWeight]) -> float:
    """Bits per weight of the decoder layers' matrices in a manifest's weight table, scales counted."""
    matrices = _layer_matrices(weights)
    bits = sum(8 * prod(entry.shape) * ITEM_BYTES[entry.dtype] for entry in matrices.values())
    return bits / layer_weights(weights)


def layer_weights(weights: Mapping[str, StoredWeight], of_experts: float = 1) -> int:
    """How many weights the decoder layers' matrices have in a manifest's weight table, `of_experts` as above."""
    return round(
        sum(
            _count(name, entry) * (of_experts if ".experts." in name else 1)
            for name, entry in _layer_matrices(weights).items()
        )
    )


def _layer_matrices(weights: Mapping[str, StoredWeight]) -> dict[str, StoredWeight]:
    """The entries of the decoder layers' matrices and their scales; routers and norms are left out."""
    return {
        name: entry
        for name, entry in weights.items()
        if ".layers." in name and name.startswith("language_model.") and "router" not in name and "norm" not in name
    }


def _count(name: str, entry: StoredWeight) -> int:
    """The weights in an entry, none in one of scales."""
    if name.endswith(".packed"):
        width = int(re.findall(r"\d+", entry.scheme)[0])
        return int(8 * prod(entry.shape) * ITEM_BYTES[entry.dtype]) // width
    return 0 if name.endswith((".scales", ".multiplier")) else prod(entry.shape)


def _line(bundle: Path, manifest: Manifest, measured: ParityReport, speed: float) -> Compared:
    values = {row.metric: row.value for row in measured.rows}
    recorded = {row.metric: row.value for row in read_json(bundle / "parity.json").rows}
    right, count = sum(one.candidate_right for one in measured.families), sum(one.count for one in measured.families)
    return Compared(
        bundle=str(bundle),
        name=manifest.name,
        backend=manifest.target.backend,
        profile=manifest.target.profile,
        bytes=sum(file.bytes for name, file in manifest.files.items() if not name.startswith(PROOFS)),
        text_bytes=decoder_bytes(manifest.weights),
        decoder_bits=decoder_bits(manifest.weights),
        kv_cache=manifest.target.kv_cache,
        kv_bytes_per_token=sum(manifest.kv_bytes_per_token[layer.attention] for layer in manifest.model.layers),
        tokens_per_second=speed,
        logits_kl_mean=values["logits_kl_mean"],
        logits_kl_standard_error=values["logits_kl_standard_error"],
        logits_kl_forced_routing=values.get("logits_kl_forced_routing"),
        logits_kl_routing_share=values.get("logits_kl_routing_share"),
        kl_over_rtn=recorded.get("kl_over_rtn"),
        same_top_token=values["same_top_token"],
        router_agreement=values.get("router_agreement"),
        accuracy_reference=values["task_accuracy_reference"],
        accuracy=values["task_accuracy_candidate"],
        accuracy_interval=accuracy_interval(right, count) if count else None,
        cases=len(measured.cases),
    )


def _tokens_per_second(bundle: Path, threads: int | None, progress: Callable[[int, int, str], None]) -> float:
    """Decoding rate of the best of `SPEED_RUNS` runs of `SPEED_TOKENS` greedy steps, one sequence."""
    import time

    best = 0.0
    progress(0, SPEED_RUNS, "runs")
    with load(bundle, threads) as session:
        for run in range(SPEED_RUNS):
            state = session.prefill(SPEED_PROMPT)
            steps = min(SPEED_TOKENS, session.context - int(state.cache.lengths[0]))
            start = time.perf_counter()
            for _ in range(steps):
                token = int(state.logits.argmax())
                session.decode(state, 0 if token == session.spec.image_token_id else token)
            best = max(best, steps / (time.perf_counter() - start))
            progress(run + 1, SPEED_RUNS, "runs")
    if not best:
        raise ArrieroError("the context leaves no room to decode", where=str(bundle))
    return best
