"""Shows a plan on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from arriero.export.machine.budget import human_bytes

if TYPE_CHECKING:
    from rich.console import Console

    from arriero.export.pipeline.planned import Plan


def show_plan(plan: Plan, console: Console) -> None:
    """Print model, stages, bundles, context prices, the needs against what there is, and warnings."""
    model = plan.model
    layers = ", ".join(f"{count} {kind}" for kind, count in model["layers"].items())
    experts = f"{model['experts']} experts, {model['experts_per_token']} per token"
    console.print(Text(model["folder"], style="bold"), soft_wrap=True)
    console.print(
        f"{model['model_type']}: {model['parameters']:,} parameters in {model['tensors']} tensors, {model['size']}; "
        f"layers: {layers}; {experts}; chunk {model['chunk']:,}"
    )
    console.print(_stages(plan))
    console.print(_targets(plan))
    console.print(_prices(plan))
    made, place = plan.reference, {"bundle": "in each bundle", "separate": "beside the bundles"}
    kept = f"at most about {human_bytes(made['record_bytes'])}, {place[made['record']]}"
    console.print(f"parity: answers are {made['answers']}; reference record {kept}", highlight=False)
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
        console.print(f"   GPU: {held} ({_limit(plan.gpu_budget)})", highlight=False)
    for target in plan.targets:
        share = plan.gpu_share(target.name) if target.on_gpu else None
        if share is not None and share.weights is not None:
            kept = f"{human_bytes(share.weights)} of {human_bytes(target.weights_bytes)} of weights stay on the GPU"
            console.print(f"   GPU: {target.name}: {kept}; the rest is sent anew for every step", highlight=False)
    for warning in plan.warnings:
        console.print(Text.assemble(("warning: ", "yellow"), warning))


def _limit(budget: int | None) -> str:
    return "no budget set" if budget is None else f"budget {human_bytes(budget)}"


def _stages(plan: Plan) -> Table:
    table = Table("stage", "key", "state", title="Stages", title_justify="left")
    table.add_column("peak memory", justify="right")
    for stage in plan.stages:
        table.add_row(
            stage.name,
            stage.key or "-",
            "[green]done[/]" if stage.done else "to do",
            f"about {human_bytes(stage.memory)}",
        )
    return table


def _targets(plan: Plan) -> Table:
    table = Table(title="Bundles", title_justify="left")
    for column in ("name", "backend", "for", "profile"):
        table.add_column(column)
    for column in ("context", "batch", "weights", "KV cache"):
        table.add_column(column, justify="right")
    for target in plan.targets:
        parts = ", ".join(f"{label} {human_bytes(size)}" for label, size in target.weights.items())
        weights = f"{human_bytes(target.weights_bytes)} ({parts})"
        cells = (target.name, target.backend, target.device, target.profile, f"{target.context:,}", str(target.batch))
        table.add_row(*cells, weights, f"{human_bytes(target.kv_bytes)} ({target.kv_cache})")
    return table


def _prices(plan: Plan) -> Table:
    table = Table("context", title="KV cache of one sequence", title_justify="left")
    kinds = [key for key in plan.context_prices[0] if key not in ("context", "tokens", "within_model")]
    for kind in kinds:
        table.add_column(kind, justify="right")
    for price in plan.context_prices:
        beyond = "" if price["within_model"] else " (beyond the model)"
        table.add_row(f"{price['context']}{beyond}", *(human_bytes(price[kind]) for kind in kinds))
    return table
