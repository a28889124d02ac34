"""Who may ask, how much, and what a server says when it is asked too much or told to stop."""

from __future__ import annotations

import base64
import io
import json
import logging
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from uvicorn.protocols.http.h11_impl import H11Protocol

from arriero.errors import ArrieroError
from arriero.runtimes.server.options import ServerOptions
from arriero.runtimes.session import Session
from tests.runtimes.conftest import EPS
from tests.runtimes.gate import Gate
from tests.runtimes.server.conftest import Serve, Served

ASK: dict[str, Any] = {"model": "toy", "messages": [{"role": "user", "content": "a secret"}], "max_tokens": 5}
KEYS = ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic right"}, {"X-Api-Key": "w"})
JSON = "application/json"
PATHS = ("/metrics", "/v1/models", "/v1/models/toy", "/v1/chat/completions", "/v1/completions", "/tokenize", "/", "/x")
PATHS += ("/v1/messages", "/v1/messages/count_tokens", "/v1/responses", "/openapi.json")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "board.local"])
def test_beyond_this_machine_a_key_is_asked_for(host: str) -> None:
    with pytest.raises(ArrieroError, match=r"without a key.*ARRIERO_API_KEY"):
        ServerOptions(host=host)
    assert ServerOptions(host=host, api_key="k").api_key == "k"
    for key in ("", "ключ"):
        with pytest.raises(ArrieroError, match="the API key is empty or"):
            ServerOptions(host=host, api_key=key)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.8.8"])
def test_this_machine_alone_needs_no_key(host: str) -> None:
    assert ServerOptions(host=host).is_local


def test_every_path_but_health_asks_for_the_key(serve: Serve, toy_session: Session) -> None:
    served = serve({"toy": toy_session}, api_key="right")
    with served.web() as web:
        assert web.get("/health").json() == {"status": "ok"}
        for path in PATHS:
            for method in ("GET", "POST", "OPTIONS", "PUT"):
                for headers in (
                    {},
                    {"Authorization": "Bearer wrong"},
                    {"Authorization": "Basic right"},
                    {"X-Api-Key": "w"},
                ):
                    answer = web.request(method, path, headers=headers)
                    assert answer.status_code == 401, (method, path)
                    assert answer.json()["error"]["code"] == "invalid_api_key"
        for headers in ({"Authorization": "Bearer right"}, {"X-Api-Key": "right"}):
            assert web.get("/v1/models", headers=headers).status_code == 200
    assert served.openai("right").chat.completions.create(**ASK).usage.completion_tokens == 5
    with pytest.raises(openai.AuthenticationError):
        served.openai("wrong").chat.completions.create(**ASK)


def test_pages_of_other_origins_and_names_are_kept_out(served: Served) -> None:
    with served.web() as web:
        answer = web.get("/v1/models", headers={"Host": "evil.example"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "wrong_host")
        answer = web.post("/v1/chat/completions", content=json.dumps(ASK), headers={"Content-Type": "text/plain"})
        assert answer.status_code == 415
        answer = web.options("/v1/chat/completions", headers={"Origin": "http://evil.example"})
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_requests_are_parsed_alike_whatever_else_is_installed(served: Served) -> None:
    assert served.http.config.http_protocol_class is H11Protocol
    assert served.http.config.ws_protocol_class is None
    with served.web(connection="Upgrade", upgrade="websocket") as web:  # which would go past the guard
        assert web.get("/health").status_code == 200


def test_what_is_no_request_is_refused_in_the_same_form(served: Served) -> None:
    cases = [("GET", "/nothing", None, 404), ("GET", "/v1/completions", None, 405), ("POST", "/health", b"{}", 405)]
    cases += [
        ("POST", "/v1/chat/completions", body, 400) for body in (b"", b"{", b"[]", b"\xff", b'{"a": ' * 9999, b"3")
    ]
    with served.web() as web:
        for method, path, body, status in cases:
            answer = web.request(method, path, content=body, headers={"Content-Type": "application/json"})
            assert answer.status_code == status, (path, body)
            assert answer.json()["error"]["message"].endswith((".", "?"))
            assert ("allow" in answer.headers) == (status == 405)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": "x", "structured_outputs": {"regex": "\ud800"}}),
        ("/v1/completions", {"prompt": "x", "structured_outputs": {"grammar": "\udfff"}}),
        ("/v1/completions", {"prompt": "x", "stop": "\ud83d"}),
        ("/v1/completions", {"prompt": "x", "\ud800": 1}),
        ("/v1/chat/completions", {"messages": [{"role": "\ud800", "content": "x"}]}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "\ud800"}], "max_tokens": 1}),
        ("/v1/responses", {"input": "x", "model": "\ud800"}),
        ("/tokenize", {"prompt": "\ud800"}),
    ],
)
def test_half_a_character_is_refused_wherever_it_stands(served: Served, path: str, fields: dict[str, Any]) -> None:
    with served.web() as web:
        answer = web.post(path, content=json.dumps({"model": "toy", **fields}), headers={"Content-Type": JSON})
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].startswith("the body: holds half of a surrogate pair")
        whole = {"model": "toy", "prompt": "\ud83d\ude00 \\ud800"}
        assert web.post("/tokenize", content=json.dumps(whole), headers={"Content-Type": JSON}).status_code == 200


def test_a_form_that_would_hold_up_every_other_answer_is_refused(served: Served) -> None:
    form = {"choice": [*map(str, range(200_000))]}
    with served.web() as web:
        answer = web.post("/v1/completions", json={"model": "toy", "prompt": "x", "structured_outputs": form})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "choice has 200,000 texts; expected at most 1,000."


def test_bodies_and_pictures_are_bounded(serve: Serve, toy_session: Session) -> None:
    limits = {"most_body_bytes": 50_000, "most_image_bytes": 2_000, "most_image_pixels": 10_000, "most_images": 2}
    served = serve({"toy": toy_session}, **limits)
    large = json.dumps({**ASK, "user": "x" * 60_000}).encode()

    def chunked() -> Any:
        yield large[:30_000]
        yield large[30_000:]

    def picture(width: int, height: int, noise: bool = False) -> dict[str, Any]:
        pixels = np.zeros((height, width, 3), np.uint8)
        if noise:
            pixels[:] = np.random.default_rng(0).integers(0, 255, pixels.shape)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        return {"type": "image_url", "image_url": {"url": url}}

    with served.web() as web:
        for content in (large, chunked()):
            answer = web.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
            assert answer.status_code == 413
        for pictures, sentence in (
            ([picture(200, 100)], "holds an image of 20,000 pixels"),
            ([picture(60, 60, True)], "holds an image of more than 2,000 bytes"),
            ([picture(9, 9)] * 3, "is one image too many"),
        ):
            messages = [{"role": "user", "content": pictures}]
            answer = web.post("/v1/chat/completions", json={**ASK, "messages": messages})
            assert (answer.status_code, sentence in answer.text) == (400, True), answer.text
        messages = [{"role": "user", "content": [picture(9, 9)] * 2}]
        assert web.post("/v1/chat/completions", json={**ASK, "messages": messages}).status_code == 200


def test_postscript_in_a_request_starts_no_program(served: Served, ghostscript: Path) -> None:
    with served.web() as web:
        for kind in ("png", "x-eps"):
            url = f"data:image/{kind};base64," + base64.b64encode(EPS).decode()
            messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
            answer = web.post("/v1/chat/completions", json={**ASK, "messages": messages})
            assert answer.status_code == 400
            assert "holds no image that can be read" in answer.text
            assert "expected a picture in one of PNG" in answer.text
    assert not ghostscript.exists()


def test_too_many_requests_are_sent_away_and_may_come_back(serve: Serve, toy_session: Session, toy: Any) -> None:
    served, gate = serve({"toy": toy_session}, most_requests=3), Gate(toy)
    answers: list[httpx.Response] = []
    with served.web() as web:
        callers = [
            threading.Thread(target=lambda: answers.append(web.post("/v1/chat/completions", json=ASK)))
            for _ in range(3)
        ]
        for caller in callers:
            caller.start()
        while served.shared.load.count < 3:
            time.sleep(0.005)
        refused = web.post("/v1/chat/completions", json=ASK)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "2")
        gate.open(10_000)
        for caller in callers:
            caller.join()
        assert [answer.status_code for answer in answers] == [200] * 3
        assert web.post("/v1/chat/completions", json={**ASK, "n": 4}).status_code == 429
        assert web.post("/v1/chat/completions", json=ASK).status_code == 200
    assert served.shared.load.count == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_answer(served: Served, toy_session: Session, toy: Any, stream: bool) -> None:
    gate = Gate(toy)
    gate.open(12)
    body = {**ASK, "max_tokens": 300, "stream": stream}
    with served.web() as web, pytest.raises(httpx.ReadTimeout):
        web.post("/v1/chat/completions", json=body, timeout=1.0)
    gate.open_while(lambda: toy_session.stats().running)  # a busy machine takes a while to tell the server
    assert toy_session.stats().generated_tokens < 30
    while served.shared.load.count:
        time.sleep(0.005)


def slowly(forward: Any) -> Any:
    def slow(*arguments: Any, **named: Any) -> Any:
        time.sleep(0.02)
        return forward(*arguments, **named)

    return slow


def test_an_answer_that_takes_too_long_is_ended(serve: Serve, toy_session: Session, toy: Any) -> None:
    served, gate = serve({"toy": toy_session}, request_seconds=0.5), Gate(toy)
    gate.open(10)
    with served.web() as web:
        threading.Timer(1.5, gate.open, (10_000,)).start()
        answer = web.post("/v1/chat/completions", json={**ASK, "max_tokens": 300})
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        toy.forward = slowly(toy.forward)
        lines = web.post("/v1/chat/completions", json={**ASK, "max_tokens": 300, "stream": True}).text.split("\n\n")
        assert '"code":"timeout"' in lines[-3]
        assert lines[-2:] == ["data: [DONE]", ""]
        while toy_session.stats().running:
            time.sleep(0.005)


def test_a_server_that_is_told_to_stop_ends_what_is_on_its_way_and_takes_no_more(
    serve: Serve, toy_session: Session, toy: Any
) -> None:
    served, gate = serve({"toy": toy_session}), Gate(toy)
    lines: list[str] = []

    def read() -> None:
        with served.web() as web, web.stream("POST", "/v1/chat/completions", json={**ASK, "stream": True}) as answer:
            lines.extend(answer.iter_lines())

    with served.web() as web:
        web.get("/health")
        reader = threading.Thread(target=read)
        reader.start()
        while not served.shared.load.count:
            time.sleep(0.005)
        served.shared.load.stopping = True
        assert web.get("/health").status_code == 503
        refused = web.post("/v1/chat/completions", json=ASK)
        assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
    served.http.should_exit = True
    gate.open(10_000)
    reader.join(60)
    assert lines[-2] == "data: [DONE]"
    served.thread.join(60)
    assert not served.thread.is_alive()


def test_the_log_names_requests_and_says_nothing_of_their_words(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "arriero.server")
    with served.web() as web:
        answer = web.post("/v1/chat/completions", json=ASK, headers={"X-Request-Id": "mine-1"})
        assert answer.headers["x-request-id"] == "mine-1"
        other = web.get("/a-secret-path", headers={"X-Request-Id": "two words"})
        assert len(other.headers["x-request-id"]) == 32
    lines = [record.getMessage() for record in caplog.records]
    assert any(line.startswith("mine-1 POST /v1/chat/completions 200") for line in lines)
    assert not any("secret" in line for line in lines)


@pytest.mark.parametrize("path", ["chat/completions", "completions", "responses", "messages"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_fault_of_the_server_is_told_to_the_log_alone(
    served: Served, toy: Any, caplog: pytest.LogCaptureFixture, path: str, stream: bool
) -> None:
    toy.forward = lambda *arguments, **named: 1 // 0
    asked = {"completions": {"prompt": "a"}, "responses": {"input": "a"}}.get(path, {"messages": ASK["messages"]})
    limit = "max_output_tokens" if path == "responses" else "max_tokens"
    with served.web() as web:
        answer = web.post(f"/v1/{path}", json={"model": "toy", **asked, limit: 5, "stream": stream})
    assert answer.status_code == (200 if stream else 500)
    assert "The server failed to answer" in answer.text
    kind = '"type":"api_error"' if path == "messages" else '"type":"server_error"'
    assert ('"code":"server_error"' if stream and path == "responses" else kind) in answer.text
    assert "division" not in answer.text
    assert "ZeroDivisionError" in caplog.text


def test_metrics_and_tokens_are_counted(served: Served, toy_session: Session) -> None:
    with served.web() as web:
        web.post("/v1/chat/completions", json=ASK)
        web.get("/nowhere")
        text = web.get("/metrics").text
        assert 'arriero_requests_total{path="/v1/chat/completions",status="200"} 1.0' in text
        assert 'arriero_requests_total{path="other",status="404"} 1.0' in text
        assert 'arriero_generated_tokens_total{bundle="toy"} 5.0' in text
        assert 'arriero_drafted_tokens_total{bundle="toy"} 0.0' in text
        assert 'arriero_running{bundle="toy"} 0.0' in text
        assert "arriero_ttft_seconds_count 1.0" in text
        tokens = web.post("/tokenize", json={"prompt": "añ"}).json()
        assert tokens == {"tokens": toy_session.processor.tokenize("añ").tolist(), "count": 3, "max_model_len": 400}
        messages = web.post("/tokenize", json={"messages": ASK["messages"]}).json()
        assert messages["tokens"] == toy_session.encode(ASK["messages"]).input_ids.tolist()
        for body in ({}, {"prompt": "a", "messages": []}, {"prompt": 3}, {"prompt": "a", "model": "x"}):
            assert web.post("/tokenize", json=body).status_code in (400, 404)
