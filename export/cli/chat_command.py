"""`arriero chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from arriero.errors import ArrieroError
from arriero.export.cli.options import BundleFolder, Context, Draft, Memory, Speculate, Threads, err

if TYPE_CHECKING:
    from arriero.runtimes.chat_session import Chat
    from arriero.runtimes.session import Session

HELP = """\
/image PATH   show a picture with what you say next; again for more
/save FILE    write the conversation to a file
/load FILE    go on with one that was written
/new          begin anew
/stats        tokens read, read before, and chosen
/help         this
/exit         leave, as Ctrl-D does; Ctrl-C ends an answer"""


def chat(
    bundle: BundleFolder,
    system: Annotated[str | None, typer.Option(help="What the model is told before everything else.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with a conversation that /save wrote.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="End an answer after so many tokens.", min=1)] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy; higher draws more freely.", min=0.0)] = 0.0,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest tokens up to this share.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes the draws repeatable.")] = None,
    adapter: Annotated[str | None, typer.Option(help="The bundle's adapter to answer with, by its name.")] = None,
    speculate: Speculate = 0,
    draft: Draft = None,
    threads: Threads = None,
    memory: Memory = None,
    context: Context = None,
) -> None:
    """Talk with a bundle. A turn reads its own words alone, however long the conversation is.

    arriero chat bundles/portable-int8

    Lines that begin with / are commands: /image PATH, /save FILE, /load FILE, /new, /stats, /help, /exit.
    """
    from rich.markup import escape

    from arriero.runtimes.api import load

    settings: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    with load(
        bundle, threads, adapter=adapter, memory=memory, speculate=speculate, draft=draft, context=context
    ) as session:
        talk = _Talk(session, system, settings)
        if resume is not None:
            talk.load(str(resume))
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 (input() has a history once it is imported)
            err.print("[dim]/help lists the commands[/]", highlight=False)
        for line in _lines():
            try:
                if not talk.take(line):
                    return
            except (ArrieroError, OSError) as error:
                err.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)


def _lines() -> Iterator[str]:
    """What the user says, line by line."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print(file=sys.stderr)
            continue
        if line:
            yield line


class _Talk:
    """The conversation and the pictures that go with the next turn."""

    def __init__(self, session: Session, system: str | None, settings: dict[str, Any]) -> None:
        self._session, self._settings = session, settings
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self._images: list[Path] = []
        self._chat: Chat = self._begin()

    def _begin(self) -> Chat:
        return self._session.chat(self._opening, **self._settings)

    def take(self, line: str) -> bool:
        """Do what `line` asks for; gives whether the conversation goes on."""
        if not line.startswith("/"):
            self._answer(line)
            return True
        name, _, argument = line[1:].partition(" ")
        if name == "exit":
            return False
        commands: dict[str, Callable[[str], object]] = {
            "image": self._show,
            "save": self._save,
            "load": self.load,
            "new": lambda _: self._restart(),
            "stats": lambda _: err.print(_counted(self._session), highlight=False),
            "help": lambda _: err.print(HELP, markup=False, highlight=False),
        }
        if name not in commands:
            raise ArrieroError(f"there is no command /{name}", expected=", ".join(f"/{each}" for each in commands))
        if name in ("image", "save", "load") and not argument:
            raise ArrieroError(f"/{name} needs a path", remedy=f"Write /{name} PATH")
        commands[name](argument.strip())
        return True

    def load(self, path: str) -> None:
        """Go on with the conversation in the file `path`."""
        chosen = {name: value for name, value in self._settings.items() if value is not None}
        self._chat = self._session.load_chat(path, **chosen)
        for message in self._chat.messages:
            content = message.get("content")
            text = content if isinstance(content, str) else "(with pictures)"
            err.print(f"{message['role']}: {text}", markup=False, highlight=False, style="dim")

    def _restart(self) -> None:
        self._chat, self._images = self._begin(), []

    def _show(self, path: str) -> None:
        if not Path(path).is_file():
            raise ArrieroError("there is no such image file", where=path, remedy="Check the path")
        self._images.append(Path(path))

    def _save(self, path: str) -> None:
        self._chat.save(path)
        err.print(f"written to {path}", markup=False, highlight=False, style="dim")

    def _answer(self, text: str) -> None:
        before = self._session.stats()
        stream = self._chat.stream(text, [*self._images])
        self._images = []
        try:
            for piece in stream:
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            stream.close()
            print("".join(stream), end="")
        print()
        result, now = stream.result, self._session.stats()
        read, reused = now.prefilled_tokens - before.prefilled_tokens, now.reused_tokens - before.reused_tokens
        rate = f", {1 / result.token_s:.1f} tokens/s" if result.token_s else ""
        counts = f"{read} tokens read, {reused} read before, TTFT {1000 * result.ttft_s:.0f} ms"
        err.print(f"[dim]{counts}, {len(result.token_ids)} tokens{rate}[/]", highlight=False)


def _counted(session: Session) -> str:
    from arriero.export.cli.show_reads import describe_drafts

    stats = session.stats()
    return (
        f"{stats.prefilled_tokens} tokens read, {stats.reused_tokens} read before, {stats.generated_tokens} chosen in "
        f"{stats.finished} answers{describe_drafts(stats)}"
    )
