"""The OpenAPI document: it names the fields that the server reads, and schemathesis finds no fault by it.

`tests/long/openapi.py` asks more.
"""

from __future__ import annotations

from typing import Any

import pytest

from arriero.runtimes.server.anthropic_messages import AnthropicCount, AnthropicMessage
from arriero.runtimes.server.chat_completions import ChatCompletion
from arriero.runtimes.server.completions import Completion
from arriero.runtimes.server.fields import Fields
from arriero.runtimes.server.options import ServerOptions
from arriero.runtimes.server.responses import ResponseRequest
from arriero.runtimes.session import Session
from tests.long.openapi import run
from tests.runtimes.server.conftest import Serve, Served
from tests.runtimes.server.test_guard import PATHS
from tests.runtimes.server.test_responses import take_tools

HELLO = [{"role": "user", "content": "x"}]
BODIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "/v1/chat/completions": (ChatCompletion, {"messages": HELLO}),
    "/v1/completions": (Completion, {"prompt": "x"}),
    "/v1/messages": (AnthropicMessage, {"messages": HELLO, "max_tokens": 3}),
    "/v1/messages/count_tokens": (AnthropicCount, {"messages": HELLO}),
    "/v1/responses": (ResponseRequest, {"input": "x"}),
}


@pytest.mark.parametrize("path", BODIES)
def test_the_document_names_the_fields_that_are_read(
    served: Served, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served.web() as web:
        document = web.get("/openapi.json").json()
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    kind, body = BODIES[path]
    read: list[set[str]] = []
    refuse = Fields.refuse_others
    monkeypatch.setattr(Fields, "refuse_others", lambda fields: (read.append({*fields._known}), refuse(fields))[1])
    kind(body, served.shared.models, ServerOptions())
    assert read[-1] == set(schema["properties"])
    assert set(schema["required"]) <= set(body)


def test_every_path_is_in_the_document(served: Served) -> None:
    with served.web() as web:
        document = web.get("/openapi.json").json()
        for path, methods in document["paths"].items():
            for method in ("get", "post"):
                answer = web.request(method, path.replace("{name}", "toy"), json={})
                assert (answer.status_code == 405) == (method not in methods), (path, method)
    assert {path.replace("{name}", "toy") for path in document["paths"]} >= set(PATHS) - {"/x"}


def test_schemathesis_finds_no_fault(serve: Serve, toy_session: Session) -> None:
    take_tools(toy_session)
    served = serve({"toy": toy_session}, most_tokens=8)
    done = run(served.url, 12, 1)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
    assert served.shared.load.count == 0
    with served.web() as web:
        counted = web.get("/metrics").text
    for path in (*BODIES, "/tokenize"):  # it was not refused each time
        assert f'arriero_requests_total{{path="{path}",status="200"}}' in counted


def test_the_key_is_in_the_document_where_one_is_asked_for(serve: Serve, toy_session: Session) -> None:
    served = serve({"toy": toy_session}, api_key="right")
    with served.web() as web:
        assert web.get("/openapi.json").status_code == 401
        document = web.get("/openapi.json", headers={"X-Api-Key": "right"}).json()
    assert document["security"] == [{"bearer": []}, {"header": []}]
    assert [path for path, one in document["paths"].items() if one.get("get", {}).get("security") == []] == ["/health"]
