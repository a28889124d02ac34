"""Refusals as OpenAI's API has them: a status and {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from arriero.errors import ArrieroError, MachineLacks

KINDS = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}
RETRY_SECONDS = 2
STREAM = "an answer that was on its way"

log = logging.getLogger("arriero.server")


class RefusalError(Exception):
    """What a request is answered with in place of what it asked for."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        """Answer with `status` and a sentence; `param` names the field of the body that is at fault."""
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The error as JSON."""
        kind = KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> Mapping[str, str]:
        """When to come back, where that helps."""
        return {"Retry-After": str(RETRY_SECONDS)} if self.status in (429, 503) else {}

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body, self.status, self.headers)


def refusal_of(error: BaseException) -> RefusalError:
    """What a client is told of `error`: a sentence where the request is at fault, else that it failed."""
    if isinstance(error, RefusalError):
        return error
    if isinstance(error, TimeoutError):
        return RefusalError(504, "The answer took longer than the server allows.", code="timeout")
    if isinstance(error, MachineLacks):
        return RefusalError(503, f"The server lacks what this takes: {error.what}.", code="overloaded")
    if isinstance(error, ArrieroError):
        if "the session is closed" in error.what:
            return RefusalError(503, "The server is stopping.", code="stopping")
        return RefusalError(400, str(error))
    return RefusalError(500, "The server failed to answer; its log says why.", code="internal_error")


def told_refusal(error: BaseException, what: str) -> RefusalError:
    """What a client is told of `error`, which ended `what`; a fault of ours is told to the log as well."""
    refusal = refusal_of(error)
    if refusal.status == 500:
        log.error("%s failed", what, exc_info=error)
    return refusal


def failure_of(error: BaseException) -> str:
    """What an error is called: the status that it is answered with, or that the client left."""
    return str(refusal_of(error).status) if isinstance(error, Exception) else "cancelled"
