"""What the commands share: their consoles, the options that several of them take, and how JSON is printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from arriero.traits import MOST_DRAFTED, MOST_THREADS


class PipeClosed(Exception):
    """Whoever read the output is gone."""


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise PipeClosed


out, err = _Console(), _Console(stderr=True)
SEED = 29  # of the held-out prompts
STDOUT = "-"

ProfileName = Annotated[str, typer.Argument(help="A shipped profile, a profile file, or a published bundle.")]
BuildFile = Annotated[Path, typer.Argument(help="The build file.", show_default=True)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of text for people.")]
BundleFolder = Annotated[Path, typer.Argument(help="A bundle folder that `arriero build` published.")]
Set = Annotated[
    str | None,
    typer.Option(
        "--set", help="A JSONL file or folder of images with the held-out prompts; the embedded ones if none."
    ),
]
SampleCount = Annotated[
    int | None,
    typer.Option("--samples", help="How many; 200 of the embedded prompts, all of a set's, when left out.", min=1),
]
Adapters = Annotated[
    list[Path] | None,
    typer.Option(help="A LoRA adapter that the build merged into the checkpoint; several in their order."),
]
ForcedRouting = Annotated[
    bool,
    typer.Option(
        "--forced-routing",
        help="Run over the prompts once more, each token sent to the experts that the reference chose: tells what part "
        "of the KL flipped routing causes.",
    ),
]
Threads = Annotated[
    int | None, typer.Option(help="CPU threads to use; every core when left out.", min=1, max=MOST_THREADS)
]

Context = Annotated[
    int | None,
    typer.Option(help="Most tokens of prompt and answer together; what the bundle was built for when left out.", min=1),
]
Memory = Annotated[
    str | None,
    typer.Option(
        help="Most memory that the process may take, such as 16GiB: experts beyond it are read as they are needed. All "
        "are mapped when left out."
    ),
]
Speculate = Annotated[
    int,
    typer.Option(
        help="Draft up to so many tokens from what prompt and answer have said, and check them in one step: the same "
        "answer, sooner where it repeats what was given. 0 drafts none.",
        min=0,
        max=MOST_DRAFTED,
    ),
]
Draft = Annotated[
    Path | None,
    typer.Option(
        help="A smaller bundle with the same tokenizer that drafts what --speculate checks, instead of what was said."
    ),
]


def print_json(data: Any) -> None:
    """Print JSON for machines."""
    print(json.dumps(data, indent=2))
