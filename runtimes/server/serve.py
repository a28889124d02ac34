"""Opens bundles and serves them until it is told to stop."""

from __future__ import annotations

import logging
import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from arriero.errors import ArrieroError
from arriero.runtimes.memory import anonymous_memory
from arriero.runtimes.server.answers import Load
from arriero.runtimes.server.app import create_app
from arriero.runtimes.server.bundle_source import BundleSource
from arriero.runtimes.server.bundles import Bundles, check_fits
from arriero.runtimes.server.options import ServerOptions

KEEP_ALIVE_S = 15

log = logging.getLogger("arriero.server")


def open_bundles(
    bundles: Sequence[Path],
    threads: int | None,
    batch: int | None,
    prefix_cache: int | None,
    memory: int | None = None,
    speculate: int = 0,
    draft: Path | None = None,
    context: int | None = None,
) -> Bundles:
    """Make ready `bundles` by the names of their folders; see `load` for the rest.

    All are opened at once; with `memory`, the most that the process may take, each when it is needed.
    """
    names = [bundle.resolve().name for bundle in bundles]
    if len(set(names)) < len(names):
        raise ArrieroError(f"two bundles are called {max(names, key=names.count)}", remedy="Rename one of the folders")
    sources = [
        BundleSource(bundle, threads, batch, prefix_cache, memory, speculate, draft, context) for bundle in bundles
    ]
    if memory is not None:
        room = max(memory - anonymous_memory(), 0)
        ready = [source.on_demand(room) for source in sources]
        check_fits(ready, room)
        return Bundles(ready, room)
    opened = Bundles([source.at_once() for source in sources])
    try:
        for bundle in opened.by_name.values():
            bundle.open()
    except BaseException:
        opened.close()
        raise
    return opened


def serve(bundles: Bundles, options: ServerOptions) -> None:
    """Answer requests until SIGINT or SIGTERM; answers on their way are given their time, then ended."""
    app, server = create_app(bundles, options)
    try:
        HttpServer(app, options, server.load).run()
    except KeyboardInterrupt:
        pass  # uvicorn raises the signals that it was stopped by once more when it has stopped
    finally:
        bundles.close()


class HttpServer(uvicorn.Server):
    """uvicorn, which refuses new requests from the moment that it is told to stop."""

    def __init__(self, app: ASGIApp, options: ServerOptions, load: Load) -> None:
        config = uvicorn.Config(
            app,
            options.host,
            options.port,
            log_config=None,
            access_log=False,  # the guard's lines say more, and nothing of the query
            lifespan="off",
            server_header=False,
            # by name: else other parsers, which nothing here was tried with, would take over where they are installed
            http="h11",
            ws="none",
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=round(options.stop_seconds),
        )
        super().__init__(config)
        self._load = load

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop."""
        if not self._load.stopping:
            log.info("stopping on %s", signal.Signals(sig).name)
        self._load.stopping = True
        super().handle_exit(sig, frame)
