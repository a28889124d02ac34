"""Shows on a terminal what the stage `calibrate` saw."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

from rich.text import Text

from arriero.export.calibration.coverage import RANGES
from arriero.export.cli.tables import print_rows, print_wrapped
from arriero.runtimes.manifest import Fallback, SampleSet
from arriero.sizes import human_bytes

if TYPE_CHECKING:
    from rich.console import Console


def show_calibration(described: dict[str, Any], console: Console) -> None:
    """Print a described calibration for people."""
    console.print(Text(str(SampleSet(**described["calibration"]))), highlight=False, soft_wrap=True)
    planned = described["planned_memory_bytes"]
    expected = f" (planned: {human_bytes(planned)})" if planned else ""
    console.print(
        f"{described['seconds']:.1f} s in the run that finished it, peak memory "
        f"{human_bytes(described['peak_memory_bytes'])}{expected}",
        highlight=False,
    )
    rows = []
    for layer in described["layers"]:
        counts, seen = layer["tokens_per_expert"], layer["largest_input"]
        spread = (min(counts), median(counts), max(counts)) if counts else ()
        experts = "/".join(f"{count:,.6g}" for count in spread) or "dense"
        ranges = (f"{seen[name]:.3g}" if name in seen else "" for name in RANGES)
        rows.append((str(layer["layer"]), experts, *ranges))
    heads = ("layer", "tokens per expert\nleast/median/most", *(name.replace(" ", "\n") for name in RANGES))
    print_rows(console, heads, rows)
    console.print("Right of the tokens: the largest magnitude of what goes in.", style="dim")
    for profile in described["profiles"]:
        experts = ", ".join(str(Fallback(**expert)) for expert in profile["experts"]) or "none"
        sentence = f"experts below the {profile['minimum_tokens']} tokens of profile {profile['name']}: {experts}"
        print_wrapped(console, sentence, style="yellow" if profile["experts"] else None)
