"""`arriero trace`: where a bundle routes the tokens of any prompts, and what a cache of experts would make of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from arriero.export.cli.options import BundleFolder, Json, Memory, Threads, err, out, print_json


def trace(
    bundle: BundleFolder,
    prompts: Annotated[
        list[str],
        typer.Argument(
            help="What to ask: texts, JSONL files with a `prompt` or `messages` per line, folders of images."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Where the trace goes, as JSON lines.")] = Path("trace.jsonl"),
    max_tokens: Annotated[int, typer.Option(help="End each answer after so many tokens.", min=1)] = 64,
    threads: Threads = None,
    memory: Memory = None,
    as_json: Json = False,
) -> None:
    """Write which experts the tokens of prompts and their answers are routed to, and how often a cache would hold them.

    A line of the trace is a token in a layer. The table below says, for caches that keep the experts of each layer that
    were used last, what share of the answers' experts they would have held: what `arriero plan --memory --trace` makes
    a speed of.

    arriero trace bundles/edge-int8 "What is 17 + 25?" questions.jsonl --output trace.jsonl
    """
    from arriero.export.cli.progress import Progress
    from arriero.export.cli.tables import print_rows
    from arriero.export.samples.data_files import read_cases
    from arriero.runtimes.api import load
    from arriero.runtimes.proof.parity_case import ParityCase
    from arriero.runtimes.routing_trace import hit_rates, trace_routes

    cases: list[ParityCase] = []
    for prompt in prompts:
        cases += read_cases(Path(prompt)) if Path(prompt).exists() else [ParityCase(prompt, "", prompt)]
    with load(bundle, threads, memory=memory) as session, Progress(err) as watch:
        routes = []
        for number, case in enumerate(cases):
            watch("trace prompts", number, len(cases), "prompts")
            routes.append(trace_routes(session, case.prompt, case.images, max_tokens))
        experts = session.spec.num_local_experts
    lines = [line for number, one in enumerate(routes) for line in one.lines(number)]
    output.write_text("\n".join(lines) + "\n")
    curve = [sum(rates) / len(rates) for rates in zip(*hit_rates(routes, experts).values(), strict=True)]
    if as_json:
        print_json({"trace": str(output), "lines": len(lines), "experts": experts, "hit_rates": curve})
        return
    parts = {experts * quarter // 4 for quarter in (1, 2, 3, 4)}
    shown = sorted({1 << power for power in range(experts.bit_length())} | parts - {0})
    rows = [(str(slots), f"{slots / experts:.0%}", f"{curve[slots - 1]:.1%}") for slots in shown]
    print_rows(out, ("experts in memory", "share", "found there"), rows, f"{len(lines)} lines in {output}")
