"""Opens bundles and serves them until it is told to stop."""

from __future__ import annotations

import logging
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from arriero.errors import ArrieroError
from arriero.runtimes.api import load
from arriero.runtimes.manifest import Manifest
from arriero.runtimes.server.answers import Load
from arriero.runtimes.server.app import create_app
from arriero.runtimes.server.options import ServerOptions
from arriero.runtimes.session import Session
from arriero.traits import TRAITS

ROWS = 8  # answers that are decoded at once, where the bundle may have any number
KEEP_ALIVE_S = 15

log = logging.getLogger("arriero.server")


def open_bundles(
    bundles: Sequence[Path], threads: int | None, batch: int | None, prefix_cache: int | None
) -> dict[str, Session]:
    """Open `bundles` by the names of their folders; see `load` for the rest."""
    names = [bundle.resolve().name for bundle in bundles]
    if len(set(names)) < len(names):
        raise ArrieroError(f"two bundles are called {max(names, key=names.count)}", remedy="Rename one of the folders")
    sessions: dict[str, Session] = {}
    try:
        for name, bundle in zip(names, bundles, strict=True):
            target = Manifest.read(bundle).target
            any_rows = TRAITS[target.backend].compiles_for != "gpu"
            rows = max(ROWS, target.batch) if batch is None and any_rows else batch
            sessions[name] = load(bundle, threads, batch=rows, prefix_cache=prefix_cache)
    except BaseException:
        for session in sessions.values():
            session.close()
        raise
    return sessions


def serve(sessions: Mapping[str, Session], options: ServerOptions) -> None:
    """Answer requests until SIGINT or SIGTERM; answers on their way are given their time, then ended."""
    app, server = create_app(sessions, options)
    try:
        HttpServer(app, options, server.load).run()
    finally:
        server.models.close()


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
