"""Events as they come, in the format of server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from arriero.runtimes.server.errors import STREAM, told_refusal

HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def event(value: Any) -> str:
    """One event with `value` as JSON."""
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


def typed_event(value: Mapping[str, Any]) -> str:
    """One event whose name is the `type` of `value`, as Anthropic's API and OpenAI's newer one have it."""
    return f"event: {value['type']}\n{event(value)}"


async def events(values: AsyncIterator[Any]) -> AsyncIterator[str]:
    """Every value as an event, then the end as OpenAI's older APIs have it; an error becomes an event of its own."""
    try:
        async for value in values:
            yield event(value)
    except Exception as error:
        yield event(told_refusal(error, STREAM).body)
    yield "data: [DONE]\n\n"
