"""Shows a plan on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from arriero.export.cli.describe_layers import describe_layers
from arriero.export.cli.tables import print_rows, print_wrapped
from arriero.export.machine.budget import human_seconds
from arriero.sizes import human_bytes

if TYPE_CHECKING:
    from rich.console import Console

    from arriero.export.pipeline.planned import Plan


def show_plan(plan: Plan, console: Console) -> None:
    """Print model, stages, bundles, context prices, the needs against what there is, and warnings."""
    model = plan.model
    layers = describe_layers(model["layers"], model["experts"], model["experts_per_token"], model["chunk"])
    console.print(Text(model["folder"], style="bold"), soft_wrap=True)
    print_wrapped(
        console,
        f"{model['model_type']}: {model['parameters']:,} parameters in {model['tensors']} tensors, {model['size']}; "
        f"layers: {layers}",
    )
    forms = ", ".join(f"{form} ({count})" for form, count in model["stored_as"].items())
    print_wrapped(console, f"layout {model['layout']}, tensors stored as {forms}")
    for adapter in model["adapters"]:
        print_wrapped(console, f"with the adapter {adapter}")
    for show in (_show_stages, _show_targets, _show_prices):
        show(plan, console)
        console.print()
    made, place = plan.reference, {"bundle": "in each bundle", "separate": "beside the bundles"}
    size = f"at most about {human_bytes(made['record_bytes'])}, " if made["record_bytes"] else ""  # unknown once made
    kept = f"{size}{place[made['record']]}"
    print_wrapped(console, f"answers are {made['answers']}; reference record {kept}", 8, "parity:")
    if not plan.done:
        print_wrapped(
            console, f"about {human_seconds(plan.seconds)} on this machine, as fast as it is now", 8, "  time:"
        )
    for name, need, budget, there in (
        ("memory", plan.peak_memory, plan.memory_budget, plan.memory_available),
        ("disk", plan.disk, plan.disk_budget, plan.disk_available),
    ):
        room = "free: unknown" if there is None else f"free {human_bytes(there)}"
        fits = need <= min(size for size in (budget, there, need) if size is not None)
        need_text = f"about {human_bytes(need)}" if need else "nothing to do"
        verdict = "" if fits else " [bold red]too little[/]"
        console.print(f"{name:>6}: {need_text} ({_limit(budget)}, {room}){verdict}", highlight=False)
    if plan.gpu_memory:
        held = f"{human_bytes(plan.gpu_memory)} of weights and cache in the largest target, scratch space on top"
        print_wrapped(console, f"{held} ({_limit(plan.gpu_budget)})", 8, "   GPU:")
    for target in plan.targets:
        share = plan.gpu_share(target.name) if target.on_gpu else None
        if share is not None and share.weights is not None:
            kept = f"{human_bytes(share.weights)} of {human_bytes(target.weights_bytes)} of weights stay on the GPU"
            print_wrapped(console, f"{target.name}: {kept}; the rest is sent anew for every step", 8, "   GPU:")
    for target in plan.targets:
        if target.quantised:
            counts = ", ".join(f"{count} {kind}" for kind, count in target.quantised.items())
            print_wrapped(console, f"of the checkpoint's quantised tensors, {counts}", 8, f"{target.name}:")
    for warning in plan.warnings:
        print_wrapped(console, warning, 9, "warning:")


def _limit(budget: int | None) -> str:
    return "no budget set" if budget is None else f"budget {human_bytes(budget)}"


def _show_stages(plan: Plan, console: Console) -> None:
    rows = [
        (
            stage.name,
            stage.key or "-",
            Text("done", "green") if stage.done else Text("to do"),
            f"about {human_bytes(stage.memory)}",
            "-" if stage.done or stage.seconds is None else f"about {human_seconds(stage.seconds)}",
        )
        for stage in plan.stages
    ]
    print_rows(console, ("stage", "key", "state", "peak memory", "time"), rows, "Stages")


def _show_targets(plan: Plan, console: Console) -> None:
    rows = []
    for target in plan.targets:
        parts = ", ".join(f"{label} {human_bytes(size)}" for label, size in target.weights.items())
        weights = f"{human_bytes(target.weights_bytes)} ({parts})"
        cells = (target.name, target.backend, target.device, target.profile, f"{target.context:,}", str(target.batch))
        rows.append((*cells, weights, f"{human_bytes(target.kv_bytes)} ({target.kv_cache})"))
    heads = ("name", "backend", "for", "profile", "context", "batch", "weights", "KV cache")
    print_rows(console, heads, rows, "Bundles")


def _show_prices(plan: Plan, console: Console) -> None:
    kinds = [key for key in plan.context_prices[0] if key not in ("context", "tokens", "within_model")]
    rows = [
        (
            f"{price['context']}{'' if price['within_model'] else ' (beyond the model)'}",
            *(human_bytes(price[kind]) for kind in kinds),
        )
        for price in plan.context_prices
    ]
    print_rows(console, ("context", *kinds), rows, "KV cache of one sequence")
