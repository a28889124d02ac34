"""Spans of OpenTelemetry: one for each request that is answered, with what became of it and no word of its prompt."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from arriero.runtimes.session import Session
from tests.runtimes.gate import Gate
from tests.runtimes.server.conftest import Serve, Served

SECRET = "a secret"
HELLO = [{"role": "user", "content": SECRET}]
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(scope="module")
def exporter() -> Iterator[InMemorySpanExporter]:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    yield exporter
    provider.shutdown()


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> Iterator[InMemorySpanExporter]:
    exporter.clear()
    yield exporter
    for span in exporter.get_finished_spans():
        assert SECRET not in span.to_json()


def the_one(spans: InMemorySpanExporter) -> ReadableSpan:
    while not spans.get_finished_spans():
        time.sleep(0.005)
    (span,) = spans.get_finished_spans()
    spans.clear()
    return span


@pytest.mark.parametrize("stream", [False, True])
def test_a_span_says_what_was_asked_and_what_it_took(
    served: Served, spans: InMemorySpanExporter, toy_session: Session, stream: bool
) -> None:
    chat: dict[str, Any] = {"messages": HELLO, "max_tokens": 5, "seed": 3, "stop": SECRET, "stream": stream}
    response: dict[str, Any] = {"input": HELLO, "max_output_tokens": 5, "instructions": SECRET, "stream": stream}
    bodies = {
        "/v1/chat/completions": chat | {"n": 2},
        "/v1/completions": {"prompt": SECRET, "max_tokens": 5, "stream": stream},
        "/v1/messages": {"messages": HELLO, "max_tokens": 5, "system": SECRET, "stream": stream},
        "/v1/responses": response,
    }
    with served.web(traceparent=PARENT, **{"X-Request-Id": "mine-1"}) as web:
        for path, body in bodies.items():
            assert web.post(path, json={"model": "toy", **body}).status_code == 200
            span = the_one(spans)
            operation = "text_completion" if path == "/v1/completions" else "chat"
            assert (span.name, span.kind, span.status.is_ok) == (f"{operation} toy", trace.SpanKind.SERVER, True)
            assert span.parent is not None
            assert trace.format_span_id(span.parent.span_id) == PARENT.split("-")[2]
            said = dict(span.attributes or {})
            count = 2 if path == "/v1/chat/completions" else 1
            assert said["gen_ai.operation.name"] == operation
            assert said["gen_ai.request.model"] == "toy"
            assert said["gen_ai.request.max_tokens"] == 5
            assert said["gen_ai.request.choice.count"] == count
            assert said["gen_ai.response.finish_reasons"] == ("length",) * count
            assert said["gen_ai.usage.output_tokens"] == 5 * count
            assert said["gen_ai.usage.input_tokens"] > said["gen_ai.usage.cache_read.input_tokens"] >= 0
            assert said["gen_ai.response.time_to_first_chunk"] > 0
            assert (said["http.route"], said["arriero.request.id"]) == (path, "mine-1")
            assert "error.type" not in said
        assert web.post("/v1/chat/completions", json={"model": "toy"}).status_code == 400
        assert web.get("/v1/models").status_code == 200
    assert spans.get_finished_spans() == ()


@pytest.mark.parametrize("stream", [False, True])
def test_a_span_says_what_went_wrong(
    serve: Serve, spans: InMemorySpanExporter, toy_session: Session, toy: Any, stream: bool
) -> None:
    served, gate = serve({"toy": toy_session}, request_seconds=0.5), Gate(toy)
    body = {"model": "toy", "messages": HELLO, "max_tokens": 300, "stream": stream}

    def failure() -> Any:
        span = the_one(spans)
        assert span.status.status_code == trace.StatusCode.ERROR
        assert "gen_ai.usage.output_tokens" not in (span.attributes or {})
        return (span.attributes or {})["error.type"]

    with served.web() as web:
        gate.open(5)
        threading.Timer(1.0, gate.open, (10_000,)).start()
        web.post("/v1/chat/completions", json=body)
        assert failure() == "504"
        assert web.post("/v1/chat/completions", json={**body, "max_tokens": 4000}).status_code == 400
        assert failure() == "400"
        while toy_session.stats().running or gate.left() < 5000:
            time.sleep(0.005)
        while gate._steps.acquire(blocking=False):
            pass
        gate.open(3)
        with pytest.raises(httpx.ReadTimeout):
            web.post("/v1/chat/completions", json=body, timeout=0.2)
        gate.open(10_000)
        assert failure() in ("cancelled", "499")


def test_without_the_api_nothing_is_missing() -> None:
    script = """
import sys
sys.modules["opentelemetry"] = None
from arriero.runtimes.server import app, spans
print(spans.trace)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"
