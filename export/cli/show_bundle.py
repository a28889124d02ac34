"""What a bundle holds, read from its manifest after every file was hashed."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.text import Text

from arriero.export.cli.describe_layers import describe_layers
from arriero.export.cli.tables import print_wrapped
from arriero.runtimes.integrity import open_manifest
from arriero.runtimes.manifest import LICENSES, RECORD_FILE, Fallback, SampleSet, Source, proof_path
from arriero.runtimes.proof.report import read_json
from arriero.sizes import human_bytes

if TYPE_CHECKING:
    from rich.console import Console

INDENT = 13  # of what is said of each name
FALLBACKS = {
    "nearest": "scales from the weights alone",
    "widest": "the widest range of inputs that an expert of their layer saw",
}


def describe_bundle(bundle: Path) -> dict[str, Any]:
    """The manifest's facts with weights summed by scheme and parity in short. Raises `ArrieroError` if damaged."""
    manifest = open_manifest(bundle, full=True)
    reports = (
        [read_json(bundle / proof_path(adapter, "parity.json")) for adapter in manifest.records]
        if manifest.proven
        else []
    )
    return {
        "name": manifest.name,
        "arriero": manifest.arriero,
        "model": manifest.model.entry(),
        "source": None if manifest.source is None else asdict(manifest.source),
        "target": asdict(manifest.target),
        "chain": asdict(manifest.chain),
        "bytes": sum(record.bytes for record in manifest.files.values()),
        "files": {name: record.bytes for name, record in manifest.files.items()},
        "licenses": [name for name in manifest.files if name.startswith(f"{LICENSES}/")],
        "weights": dict(Counter(weight.scheme for weight in manifest.weights.values())),
        "calibration": None if manifest.calibrated.calibration is None else asdict(manifest.calibrated.calibration),
        "coverage": manifest.calibrated.coverage,
        **asdict(manifest.rounded),
        "kv_cache": manifest.target.kv_cache,
        "kv_bytes_per_token": manifest.kv_bytes_per_token,
        "measured": asdict(manifest.measured),
        "tools": manifest.tools,
        "adapters": {name: asdict(one) for name, one in manifest.adapters.items()},
        "record": {"hash": manifest.record, "in_bundle": RECORD_FILE in manifest.files},
        "parity": {
            "failed": [row.metric for report in reports for row in report.failed],
            "rows": sum(len(report.rows) for report in reports),
        }
        if reports
        else None,
    }


def show_bundle(described: dict[str, Any], console: Console) -> None:
    """Print a described bundle for people."""
    target, text, calibration = described["target"], described["model"]["text"], described["calibration"]
    kinds = Counter(f"{layer['attention']} {layer['ffn']}" for layer in text["layers"])
    numbers = (text["num_local_experts"], text["num_experts_per_tok"], text["attention_chunk_size"])
    layers = describe_layers(kinds, *numbers)
    vision = "text and image" if described["model"]["vision"] else "text"
    rows = {
        "bundle": f"[bold]{described['name']}[/], {human_bytes(described['bytes'])}, every file as recorded",
        "target": f"{target['backend']}, profile {escape(target['profile'])}, context {target['context']:,}, "
        f"batch {target['batch']}, arch {target['arch']}",
        "model": f"{described['model']['model_type']} ({vision}); {layers}",
        "weights": ", ".join(f"{count} x {scheme}" for scheme, count in described["weights"].items()),
        "chain": " → ".join(f"{name} {value[:8]}" for name, value in described["chain"].items()),
        "KV cache": f"{described['kv_cache']}, "
        + ", ".join(
            f"{human_bytes(size)} per token and {kind} layer" for kind, size in described["kv_bytes_per_token"].items()
        ),
        "calibration": "none" if calibration is None else escape(str(SampleSet(**calibration))),
        "coverage": _coverage(described["coverage"], "parity" if calibration is None else "calibration"),
        "fallback": _fallback(described["fallback"]),
        "choice": _choice(described["choice"]),
        "reference": f"record {described['record']['hash'][:12]}, "
        + ("in the bundle" if described["record"]["in_bundle"] else "kept apart"),
        "parity": _parity(described["parity"]),
        "built with": ", ".join(f"{name} {version}" for name, version in described["tools"].items()),
    }
    if described["adapters"]:
        rows["adapters"] = ", ".join(described["adapters"]) + ", switched with `--adapter`; each is proven"
    if described["source"]:
        source = escape(str(Source(**described["source"])))
        rows["made of"] = f"[yellow]{source}[/]" if described["source"]["synthetic"] else source
    if described["licenses"]:
        rows["licences"] = escape(", ".join(described["licenses"]))
    for name, value in rows.items():
        said = Text.from_markup(value)
        style = str(said.spans[0].style) if said.spans else None
        print_wrapped(console, said.plain, INDENT, name, style)


def _parity(proof: dict[str, Any] | None) -> str:
    if proof is None:
        return "[yellow]not proven: run `arriero parity` on the device that it is for[/]"
    if proof["failed"]:
        return f"[red]failed: {', '.join(proof['failed'])}[/]"
    return "[green]passed[/], see `arriero parity --recorded`"


def _fallback(entries: list[dict[str, Any]]) -> str:
    if not entries:
        return "none: no matrix of an expert was rounded for lack of calibration tokens"
    sentences = [
        f"[yellow]too few calibration tokens, so {meaning}:[/] {', '.join(str(Fallback(**entry)) for entry in thin)}"
        for rule, meaning in FALLBACKS.items()
        if (thin := [entry for entry in entries if entry["rule"] == rule])
    ]
    return "; ".join(sentences)


def _choice(choice: dict[str, Any] | None) -> str:
    if choice is None:
        return "none: the profile names every tensor's scheme"
    by_scheme: dict[str, list[str]] = {}
    for row in choice["groups"]:
        by_scheme.setdefault(row["scheme"], []).append(f"{row['group']} {row['layer']}")
    schemes = "; ".join(f"{scheme}: {', '.join(groups)}" for scheme, groups in by_scheme.items())
    return f"{choice['share']:.3f} of bf16, budget {choice['budget']:g}; by group and layer, {schemes}"


def _coverage(coverage: dict[str, list[int]], where: str) -> str:
    unseen = [
        f"layer {layer} expert {n}" for layer, counts in coverage.items() for n, got in enumerate(counts) if not got
    ]
    if unseen:
        return f"[yellow]no {where} token reached {', '.join(unseen)}[/]"
    lows = ", ".join(f"layer {layer}: {min(counts)} to {max(counts)}" for layer, counts in coverage.items())
    return f"every expert reached; {where} tokens per expert, {lows}"
