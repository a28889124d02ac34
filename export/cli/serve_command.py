"""`arriero serve`: bundles over HTTP."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from arriero.errors import ArrieroError, MachineLacks
from arriero.export.cli.options import Context, Draft, Speculate, Threads, err
from arriero.runtimes.server.options import ServerOptions
from arriero.sizes import parse_bytes
from arriero.traits import install


def serve(
    bundles: Annotated[list[Path], typer.Argument(help="Bundle folders; each is a model by its folder's name.")],
    host: Annotated[
        str, typer.Option(help="The address to listen at; beyond this machine a key is asked for.")
    ] = ServerOptions.host,
    port: Annotated[int, typer.Option(help="The port to listen at.", min=0, max=65535)] = ServerOptions.port,
    api_key_file: Annotated[
        Path | None, typer.Option(help="A file with the key that clients must send; else ARRIERO_API_KEY is it.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Answers decoded at once; 8, or what a GPU's engines take, if left out.", min=1)
    ] = None,
    prefix_cache: Annotated[
        str | None,
        typer.Option(help="Memory for prompts read before, such as 2GiB, or 0; else an eighth of what is free."),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Most memory that the process may take, such as 16GiB: bundles are opened when they are needed, and "
            "the one unused for longest is closed. All are opened at the start when left out."
        ),
    ] = None,
    max_requests: Annotated[
        int, typer.Option(help="Answers on their way at once; more are sent away.", min=1)
    ] = ServerOptions.most_requests,
    max_tokens: Annotated[int | None, typer.Option(help="The longest answer; else the context is.", min=1)] = None,
    allow_images_from: Annotated[
        list[str] | None,
        typer.Option(help="A domain that pictures may be fetched from by https, such as example.org; several in turn."),
    ] = None,
    timeout: Annotated[
        float, typer.Option(help="Seconds that a request may take.", min=1)
    ] = ServerOptions.request_seconds,
    speculate: Speculate = 0,
    draft: Draft = None,
    context: Context = None,
    threads: Threads = None,
) -> None:
    """Serve bundles over HTTP as OpenAI's and Anthropic's APIs have it, on this machine alone without --host.

    arriero serve bundles/portable-int8

    A page to chat with is at /. Paths: /v1/chat/completions, /v1/completions, /v1/responses, /v1/messages, /v1/models,
    /tokenize, /openapi.json, /health, /metrics. Ctrl-C ends it once the answers on their way are done.
    """
    try:
        from arriero.runtimes.server.serve import open_bundles
        from arriero.runtimes.server.serve import serve as serve_bundles
    except ModuleNotFoundError as error:
        raise MachineLacks(
            f"the package {(error.name or 'starlette').partition('.')[0]} is not installed",
            remedy=f"Install it with `{install('server')}`",
        ) from None
    key = os.environ.get("ARRIERO_API_KEY") if api_key_file is None else _read_key(api_key_file)
    options = ServerOptions(
        host,
        port,
        key,
        most_requests=max_requests,
        most_tokens=max_tokens,
        image_domains=tuple(allow_images_from or ()),
        request_seconds=timeout,
    )
    room = None if prefix_cache is None else 0 if prefix_cache == "0" else parse_bytes(prefix_cache)
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    most = None if memory is None else parse_bytes(memory)
    ready = open_bundles(bundles, threads, batch, room, most, speculate, draft, context)
    url = f"http://{host}:{port}"
    serving = f"Serving {', '.join(ready.by_name)} at {url}/v1; chat in a browser at {url}/"
    err.print(serving, highlight=False, soft_wrap=True)
    serve_bundles(ready, options)


def _read_key(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ArrieroError(f"the key cannot be read ({error})", where=str(file), remedy="Check the path") from None
