"""The `arriero` command: a thin skin over library calls; its help says what the exit codes mean."""

from __future__ import annotations

import inspect
import os
import sys
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from arriero.errors import ArrieroError
from arriero.export.cli import build_commands, bundle_commands, machine_commands, store_commands
from arriero.export.cli.chat_command import chat
from arriero.export.cli.options import STDOUT, PipeClosed, err
from arriero.export.cli.profile_commands import profiles_app
from arriero.export.cli.serve_command import serve
from arriero.export.cli.trace_command import trace
from arriero.version import __version__

PIPE_CLOSED = 141  # as a shell says of what SIGPIPE ended


class _Group(TyperGroup):
    """The commands. Whoever reads their output may go away, which is no failed parity."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        _unbreak(self)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise PipeClosed from None


def _unbreak(command: Any) -> None:
    """Make each paragraph of a command's help, and of its own commands', one line, which a terminal breaks as it fits.

    What is indented stays as it is.
    """
    paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
    command.help = "\n\n".join(one if one.startswith(" ") else one.replace("\n", " ") for one in paragraphs)
    for own in getattr(command, "commands", {}).values():
        _unbreak(own)


app = typer.Typer(
    cls=_Group,
    name="arriero",
    help=(
        "Takes Llama 4 mixture-of-experts checkpoints to bundles that run at the edge, with measured proof that they "
        "still compute what the PyTorch reference computes.\n\n"
        "A first session: [bold]arriero doctor[/] says what this machine can do, [bold]arriero plan[/] what a build "
        "would do and cost, [bold]arriero build[/] does it, and "
        "[bold]arriero run bundles/portable-int8 'What is 17 + 25?'[/] "
        "asks the result a question.\n\n"
        "Exit codes: 0 ok, 1 parity or quality below its threshold, 2 a mistake in what was given, 3 the machine lacks "
        "something, 70 a fault in arriero itself, 130 stopped with Ctrl-C, 141 whoever read the output went away."
    ),
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(build_commands.plan)
app.command()(build_commands.build)
app.command()(build_commands.calibrate)
app.command()(bundle_commands.parity)
app.command()(bundle_commands.run)
app.command()(chat)
app.command()(serve)
app.command()(bundle_commands.inspect)
app.command()(trace)
app.command()(store_commands.push)
app.command()(store_commands.pull)
app.command()(machine_commands.doctor)
app.command()(bundle_commands.compare)
app.command()(build_commands.schema)
app.add_typer(profiles_app)


def _version(asked: bool) -> None:
    if asked:
        print(f"arriero {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command; one of our errors becomes one message and its exit code."""
    try:
        try:
            app(_named_json(sys.argv[1:]), prog_name="arriero")
        finally:
            sys.stdout.flush()
    except ArrieroError as error:
        err.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except (PipeClosed, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered has no reader either
        sys.exit(PIPE_CLOSED)


def _named_json(words: list[str]) -> list[str]:
    """The arguments with `--json` of `build` given a value: it takes a FILE, and prints where none follows."""
    if words[:1] != ["build"]:
        return words
    named = []
    for word, following in zip(words, [*words[1:], "-"], strict=True):
        file = not following.startswith("-") and not following.endswith((".yaml", ".yml"))
        named.append(f"--json={STDOUT}" if word == "--json" and not file else word)
    return named
