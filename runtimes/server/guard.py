"""What every request goes through before anything reads it: its name in the log, the key, the host, the size.

No answer says to a browser that pages of other origins may read it.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import logging
import re
import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from arriero.runtimes.server.errors import RefusalError
from arriero.runtimes.server.metrics import Metrics
from arriero.runtimes.server.options import ServerOptions
from arriero.runtimes.server.page import PATH as PAGE

log = logging.getLogger("arriero.server")
OPEN = "/health"
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
PAGE_ASKS = 'Basic realm="arriero: any name, the key as password", charset="UTF-8"'
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Guard:
    """An ASGI app around another."""

    def __init__(self, app: ASGIApp, options: ServerOptions, metrics: Metrics, paths: frozenset[str]) -> None:
        """Guard `app` as `options` say; `paths` are those that are counted by name."""
        self._app, self._options, self._metrics, self._paths = app, options, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        asked = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = asked if REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started, status = time.perf_counter(), 0

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            try:
                self._check(scope, headers)
            except RefusalError as refusal:
                response = refusal.response()
                if refusal.status == 401:  # a browser asks its user for the page's key, and sends it from then on
                    response.headers["WWW-Authenticate"] = PAGE_ASKS if scope["path"] == PAGE else "Bearer"
                await response(scope, receive, send_named)
            else:
                await self._app(scope, self._limited(receive), send_named)
        finally:
            seconds = time.perf_counter() - started
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.requested(path, status, seconds)
            log.info("%s %s %s %d %.3f s", request_id, scope["method"], path, status, seconds)

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        """Refuse what may not come in."""
        if scope["path"] == OPEN:
            return
        options = self._options
        if options.api_key is None:
            host = headers.get(b"host", b"").decode("latin-1")
            if host.rpartition(":")[0] not in LOCAL_NAMES and host not in LOCAL_NAMES and host != options.host:
                # a page of a stranger's whose name leads here would be of this origin to a browser
                raise RefusalError(403, f"The host {host!r:.60} is not this server's.", code="wrong_host")
        else:
            if not hmac.compare_digest(_sent_key(headers), options.api_key.encode()):
                raise RefusalError(401, "The API key is missing or wrong.", code="invalid_api_key")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > options.most_body_bytes:
            raise self._too_large()

    def _too_large(self) -> RefusalError:
        return RefusalError(413, f"The body is larger than {self._options.most_body_bytes:,} bytes.")

    def _limited(self, receive: Receive) -> Receive:
        """`receive` that refuses a body which turns out larger than it may be."""
        size = 0

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._options.most_body_bytes:
                raise self._too_large()
            return message

        return limited


def _sent_key(headers: dict[bytes, bytes]) -> bytes:
    """The key that a request brings: as programs send it, or as a browser sends a password."""
    kind, _, key = headers.get(b"authorization", b"").partition(b" ")
    if kind.lower() == b"bearer":
        return key.strip()
    if kind.lower() == b"basic":
        try:
            return base64.b64decode(key.strip(), validate=True).partition(b":")[2]
        except binascii.Error:
            return b""
    return headers.get(b"x-api-key", b"").strip()
