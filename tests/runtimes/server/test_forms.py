"""Forms are compiled beside the event loop, few at a time, once for all answers of a request."""

from __future__ import annotations

import json
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from arriero.runtimes.forced_calls import ForcedCalls
from arriero.runtimes.grammar import Constraint, Form, Grammars
from arriero.runtimes.processor.processor import Processor
from arriero.runtimes.scheduler import EngineLimits
from arriero.runtimes.session import Session
from tests.runtimes.server.conftest import Serve, Served
from tests.runtimes.test_grammar import ADD

pytest.importorskip("llguidance", reason="needs llguidance: pip install 'arriero[structured]'")

FREE: dict[str, Any] = {"prompt": "x", "max_tokens": 3}
FORMED: dict[str, Any] = {**FREE, "structured_outputs": {"choice": ["ab", "cd"]}}
PATH = "/v1/completions"


class Compiling:
    """Holds up whoever compiles a form until it is let go, and counts those that are at it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.go = threading.Semaphore(0), threading.Event()
        self.now = self.most = 0
        constrain, lock = Grammars.constrain, threading.Lock()

        def held_up(grammars: Grammars, form: Form) -> Constraint:
            with lock:
                self.now += 1
                self.most = max(self.most, self.now)
            self.entered.release()
            try:
                assert self.go.wait(20), "nobody lets it go"
                return constrain(grammars, form)
            finally:
                with lock:
                    self.now -= 1

        monkeypatch.setattr(Grammars, "constrain", held_up)


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> Compiling:
    return Compiling(monkeypatch)


def test_others_are_answered_while_a_form_is_compiled(served: Served, compiling: Compiling) -> None:
    with served.web() as web, ThreadPoolExecutor(1) as pool:
        formed = pool.submit(web.post, PATH, json=FORMED)
        assert compiling.entered.acquire(timeout=20)
        assert web.post(PATH, json=FREE).status_code == 200
        assert compiling.now == 1  # still at it
        compiling.go.set()
        assert formed.result().json()["choices"][0]["text"] in ("ab", "cd")


def test_few_forms_are_compiled_at_once_also_when_clients_leave(served: Served, compiling: Compiling) -> None:
    with served.web() as web, ThreadPoolExecutor(6) as pool:
        left = [pool.submit(web.post, PATH, json=FORMED, timeout=0.5) for _ in range(3)]
        for one in left:
            assert isinstance(one.exception(), httpx.TimeoutException)
        asked = [pool.submit(web.post, PATH, json=FORMED) for _ in range(3)]
        assert web.post(PATH, json=FREE).status_code == 200
        compiling.go.set()
        assert all(one.result().json()["choices"][0]["text"] in ("ab", "cd") for one in asked)
        assert compiling.most <= 2


def test_the_vocabulary_is_read_when_a_bundle_is_opened(served: Served, toy_session: Session) -> None:
    """Nobody can run Python meanwhile."""
    assert toy_session.processor.grammars._tokenizer is not None


def test_a_form_that_fails_as_it_is_compiled_is_refused(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does over large vocabularies: before anything runs, with the reason, and without the matcher's state."""
    from llguidance import LLMatcher

    monkeypatch.setattr(LLMatcher, "is_error", lambda _: True)
    monkeypatch.setattr(LLMatcher, "get_error", lambda _: "lexer error:\ntoo many expressions\n<state>\nTokens: ..")
    with served.web() as web:
        answer = web.post(PATH, json=FORMED)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(
        "choice cannot be enforced: lexer error: too many expressions. "
    )


def test_all_answers_of_a_request_share_one_compiled_form(
    served: Served, toy_session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each follows it from the start, whatever the others say."""
    from llguidance import LLMatcher

    validated: list[Any] = []
    validate = LLMatcher.validate_grammar_with_warnings
    monkeypatch.setattr(
        LLMatcher, "validate_grammar_with_warnings", lambda *args: validated.append(1) or validate(*args)
    )
    with served.web() as web:
        said = web.post(PATH, json={**FORMED, "n": 4, "seed": 1, "temperature": 3}).json()["choices"]
    assert [choice["text"] in ("ab", "cd") for choice in said] == [True] * 4
    assert len(validated) == 1


def test_forced_calls_are_written_as_the_template_writes_calls(
    serve: Serve, toy: Any, bundle: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(bundle / "tokenizer", folder)
    with (folder / "chat_template.jinja").open("a") as file:
        file.write("{% if tools %}Call as [name(argument=value)].{% endif %}")
    session = Session(toy, Processor(folder, toy.spec), 400, 4, limits=EngineLimits(4, 400))
    messages = [{"role": "user", "content": "x"}]
    with serve({"toy": session}).web() as web:
        for choice in ("required", {"type": "function", "function": {"name": "add"}}):
            body = {"messages": messages, "tools": [ADD], "tool_choice": choice, "parallel_tool_calls": False}
            body |= {"temperature": 2, "seed": 1}
            (call,) = web.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["tool_calls"]
            arguments = json.loads(call["function"]["arguments"])
            assert (call["function"]["name"], {*arguments}) == ("add", {"a", "b"})
        # and over a form that the answer would have without
        body |= {"response_format": {"type": "json_object"}}
        assert web.post("/v1/chat/completions", json=body).json()["choices"][0]["finish_reason"] == "tool_calls"
    said = session.generate(messages, tools=[ADD], calls=ForcedCalls([ADD["function"]]), temperature=2.0, seed=1).text
    assert re.fullmatch(r"\[add\(a=\d+, b=[12]\)\]", said)
