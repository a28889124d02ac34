"""Events as they come, in the format of server-sent events, ended as OpenAI's API ends them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from arriero.runtimes.server.errors import refusal_of

HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def event(value: Any) -> str:
    """One event with `value` as JSON."""
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def events(values: AsyncIterator[Any]) -> AsyncIterator[str]:
    """Every value as an event, then the end; an error on the way becomes an event of its own."""
    try:
        async for value in values:
            yield event(value)
    except Exception as error:
        yield event(refusal_of(error).body)
    yield "data: [DONE]\n\n"
