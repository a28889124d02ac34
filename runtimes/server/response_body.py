"""The response to one request of /v1/responses as it stands, and the items that it is made of."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from arriero.runtimes.generation import TokenLogprobs
from arriero.runtimes.processor.tool_calls import ToolCall
from arriero.runtimes.server.answers import Answers
from arriero.runtimes.server.logprob_entries import logprob_entries
from arriero.runtimes.server.models import Model


class ResponseBody:
    """A response by its id, with what it repeats of its request."""

    def __init__(self, model: Model, repeated: dict[str, Any]) -> None:
        """Begin the response that `model` gives; `repeated` are fields as the request, or its defaults, have them."""
        self._model = model
        head = {"id": f"resp_{uuid.uuid4().hex}", "object": "response", "created_at": int(time.time())}
        head |= {"model": model.name, "error": None, "incomplete_details": None, "usage": None}
        self._fields: dict[str, Any] = {**head, **repeated}

    def now(self, status: str, output: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """The response as it stands."""
        return {**self._fields, "status": status, "output": output, **more}

    def finished(self, answers: Answers, output: list[dict[str, Any]]) -> dict[str, Any]:
        """The response at its end."""
        used = answers.usage()
        usage = {
            "input_tokens": used["prompt_tokens"],
            "input_tokens_details": {**used["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": used["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": used["total_tokens"],
        }
        status = status_of(answers)
        if status == "incomplete":
            return self.now(status, output, usage=usage, incomplete_details={"reason": "max_output_tokens"})
        return self.now(status, output, usage=usage, completed_at=int(time.time()))

    def logprobs(self, entries: tuple[TokenLogprobs, ...]) -> list[dict[str, Any]]:
        """Log-probabilities as the text's part has them."""
        return logprob_entries(self._model.session.processor, entries)


def status_of(answers: Answers) -> str:
    """What became of the answer, and so of its items."""
    return "incomplete" if answers.streams[0].result.finish_reason == "length" else "completed"


def message_item(name: str, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
    """A message of the assistant's, by its id."""
    return {"id": name, "type": "message", "role": "assistant", "status": status, "content": content}


def message_id() -> str:
    """A new message's id."""
    return f"msg_{uuid.uuid4().hex}"


def text_part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    """The text of a message."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def call_item(call: ToolCall) -> dict[str, Any]:
    """A call of a function."""
    return {
        "id": f"fc_{uuid.uuid4().hex}",
        "type": "function_call",
        "call_id": f"call_{uuid.uuid4().hex[:24]}",
        "name": call.name,
        "arguments": json.dumps(call.arguments, ensure_ascii=False),
        "status": "completed",
    }
