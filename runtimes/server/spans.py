"""A span of OpenTelemetry for each request that is answered, where its API is installed; no word of a prompt in it.

Attributes are those of the semantic conventions for generative AI. Spans go where an SDK that was set up before takes
them; without one they cost nothing.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from starlette.requests import Request

from arriero.runtimes.server.answer_fields import AnswerFields
from arriero.runtimes.server.answers import Answers
from arriero.runtimes.server.errors import failure_of

try:
    from opentelemetry import propagate, trace
except ImportError:
    trace = None  # type: ignore[assignment]

SETTINGS = ("max_tokens", "temperature", "top_p", "top_k", "seed", "frequency_penalty", "presence_penalty")


class AnswerSpan:
    """The span of one request, from when it is understood to the end of its answer."""

    def __init__(self, request: Request, operation: str, asked: AnswerFields) -> None:
        """Begin it, below the span that the request's headers name; `operation` as the conventions have it."""
        self._span: Any = None
        self.answers: Answers | None = None
        if trace is None:
            return
        settings: dict[str, Any] = {**asked.settings}
        attributes = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "arriero",
            "gen_ai.request.model": asked.model.name,
            "gen_ai.request.choice.count": asked.count,
            "http.route": request.url.path,
            "arriero.request.id": request.state.request_id,
        }
        for name in SETTINGS:
            if settings.get(name) is not None:
                attributes[f"gen_ai.request.{name}"] = settings[name]
        self._span = trace.get_tracer("arriero").start_span(
            f"{operation} {asked.model.name}",
            propagate.extract(dict(request.headers)),
            trace.SpanKind.SERVER,
            attributes,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End it with what became of the answer."""
        if self._span is None:
            return
        answers = self.answers
        failure = failure_of(error) if error is not None else answers.failure if answers is not None else None
        if answers is not None and answers.finished:
            self._span.set_attributes(_outcome(answers))
        elif failure is None:
            failure = "cancelled"  # the client left before the end
        if failure is not None:
            self._span.set_attribute("error.type", failure)
            self._span.set_status(trace.StatusCode.ERROR)
        self._span.end()


def _outcome(answers: Answers) -> dict[str, Any]:
    usage = answers.usage()
    return {
        "gen_ai.response.finish_reasons": [stream.result.finish_reason for stream in answers.streams],
        "gen_ai.response.time_to_first_chunk": min(stream.result.ttft_s for stream in answers.streams),
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": usage["completion_tokens"],
        "gen_ai.usage.cache_read.input_tokens": usage["prompt_tokens_details"]["cached_tokens"],
    }
