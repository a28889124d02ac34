"""Several bundles within a budget of memory: opened when they are needed, closed for others, never while in use."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import arriero
from arriero.errors import ArrieroError
from arriero.runtimes.backend import CapsMemory
from arriero.runtimes.memory import anonymous_memory
from arriero.runtimes.processor.processor import Processor
from arriero.runtimes.scheduler import EngineLimits
from arriero.runtimes.server.bundles import Bundle, Bundles
from arriero.runtimes.server.serve import open_bundles
from arriero.runtimes.session import Session
from tests.runtimes.gate import Gate
from tests.runtimes.server.conftest import Serve, Served

HELLO: list[Any] = [{"role": "user", "content": "Hello there"}]
ASK: dict[str, Any] = {"messages": HELLO, "max_tokens": 3, "temperature": 0}


class Toys:
    """Bundles of one byte each over toys, whose sessions are counted and may be slow to open."""

    def __init__(self, make_toy: Any, processor: Processor, names: str) -> None:
        self.toys = {name: make_toy() for name in names}
        self.sessions: list[Session] = []
        self.slow = threading.Event()
        self.slow.set()
        self._processor = processor
        self.bundles = [self._bundle(name) for name in names]

    def _bundle(self, name: str) -> Bundle:
        return Bundle(name, 400, ("pirate",), name * 16, 1, lambda: self._open(name))

    def _open(self, name: str) -> Session:
        assert self.slow.wait(60)
        limits = EngineLimits(4, 400, None, 1 << 20)
        session = Session(self.toys[name], self._processor, 400, 4, ("pirate",), limits=limits, identity=name * 16)
        self.sessions.append(session)
        return session

    @property
    def open(self) -> list[str]:
        return [bundle.name for bundle in self.bundles if bundle.session is not None]


@pytest.fixture
def toys(toy: Any, processor: Processor) -> Toys:
    return Toys(type(toy), processor, "abc")


def ask(served: Served, model: str, **more: Any) -> httpx.Response:
    with served.web() as web:
        return web.post("/v1/chat/completions", json={"model": model, **ASK, **more})


def metric(served: Served, line: str) -> float:
    with served.web() as web:
        (value,) = [one.rpartition(" ")[2] for one in web.get("/metrics").text.splitlines() if one.startswith(line)]
    return float(value)


def test_the_bundle_unused_for_longest_is_closed_for_one_that_is_needed(serve: Serve, toys: Toys) -> None:
    served = serve(Bundles(toys.bundles, 2))
    names = [f"{name}{adapter}" for name in "abc" for adapter in ("", ":pirate")]
    assert [model.id for model in served.openai().models.list()] == names
    assert toys.open == []
    for name, left in (("a", "a"), ("b:pirate", "ab"), ("a", "ab"), ("c", "ac"), ("b", "bc"), ("b", "bc")):
        answer = ask(served, name)
        assert (answer.status_code, answer.json()["model"]) == (200, name)
        assert answer.json()["system_fingerprint"] == f"arriero-{name[0] * 12}"
        assert toys.open == list(left)
    assert [metric(served, f'arriero_bundle_open{{bundle="{name}"}}') for name in "abc"] == [0, 1, 1]
    assert [metric(served, f'arriero_bundle_opened_total{{bundle="{name}"}}') for name in "abc"] == [1, 2, 1]
    assert [metric(served, f'arriero_generated_tokens_total{{bundle="{name}"}}') for name in "abc"] == [6, 9, 3]
    assert metric(served, "arriero_memory_bytes ") == 2
    served.stop()
    served.shared.bundles.close()
    for session in toys.sessions:
        with pytest.raises(ArrieroError, match="the session is closed"):
            _ = session.backend


def test_a_bundle_in_use_is_not_closed_and_others_are_sent_away(serve: Serve, toys: Toys) -> None:
    served, gate = serve(Bundles(toys.bundles, 2)), Gate(toys.toys["a"])
    with ThreadPoolExecutor(2) as pool:
        streaming = pool.submit(ask, served, "a", stream=True)
        while toys.open != ["a"]:
            time.sleep(0.005)
        assert ask(served, "b").status_code == 200
        assert ask(served, "c").status_code == 200
        assert toys.open == ["a", "c"]  # b went, though a was asked before it
        toys.bundles[2].nbytes = 2
        with served.web() as web:
            messages = web.post("/v1/messages", json={"model": "b", **ASK})
            assert messages.status_code == 200  # c goes for b
            refused = web.post("/tokenize", json={"model": "c", "prompt": "x"})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
        assert refused.json()["error"]["code"] == "no_memory"
        assert "no memory for c while others are in use (a)" in refused.json()["error"]["message"]
        assert toys.open == ["a", "b"]  # nothing is closed in vain
        gate.open(10_000)
        assert "[DONE]" in streaming.result().text
    while toys.bundles[0].users:
        time.sleep(0.005)
    assert ask(served, "c").status_code == 200
    assert toys.open == ["c"]


def test_a_client_that_leaves_while_a_bundle_is_opened_stops_nothing(serve: Serve, toys: Toys) -> None:
    served = serve(Bundles(toys.bundles, 1), request_seconds=1.0)
    toys.slow.clear()
    with pytest.raises(httpx.ReadTimeout), served.web() as web:
        web.post("/v1/chat/completions", json={"model": "a", **ASK}, timeout=0.3)
    late = ask(served, "a")
    assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(ask, served, "a") for _ in range(3)]
        time.sleep(0.1)
        toys.slow.set()
        assert [answer.result().status_code for answer in answers] == [200] * 3
    assert len(toys.sessions) == 1
    assert served.shared.load.count == toys.bundles[0].users == 0


def test_what_is_being_opened_when_the_server_stops_is_closed(toys: Toys) -> None:
    served = Served(Bundles(toys.bundles, 1), arriero.runtimes.server.options.ServerOptions(port=0, stop_seconds=1))
    toys.slow.clear()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, served, "a")
        while not toys.bundles[0].users:
            time.sleep(0.005)
        served.http.should_exit = True
        served.thread.join(60)
        threading.Timer(0.2, toys.slow.set).start()
        served.shared.bundles.close()
        with pytest.raises(httpx.HTTPError):
            answer.result().raise_for_status()
    (session,) = toys.sessions
    with pytest.raises(ArrieroError, match="the session is closed"):
        _ = session.backend


def test_many_clients_of_many_bundles_get_their_answers_or_are_sent_away(serve: Serve, toys: Toys) -> None:
    served = serve(Bundles(toys.bundles, 2))
    expected = ask(served, "a").json()["choices"][0]["message"]

    def one(number: int) -> int:
        for _ in range(200):
            answer = ask(served, "abc"[number % 3], stream=False)
            if answer.status_code == 200:
                assert answer.json()["choices"][0]["message"] == expected
                return 1
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_memory")
            time.sleep(0.01)
        return 0

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(one, range(40))) == 40
    assert sum(bundle.opened for bundle in toys.bundles) >= 3
    assert len([session for session in toys.sessions if session.engine._backend is not None]) <= 2


# --- bundles in folders


def room(nbytes: int) -> int:
    return anonymous_memory() + nbytes


def test_folders_are_opened_within_the_memory_of_the_process(
    workshop: Path, tmp_path: Path, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    folders = [tmp_path / name for name in ("fp32", "int8")]
    for folder in folders:
        shutil.copytree(workshop / "bundles" / folder.name, folder)
    bundles = open_bundles(folders, 1, None, 1 << 20, room(256 << 20))
    sizes = [bundle.nbytes for bundle in bundles.by_name.values()]
    assert all(folder.stat() and (32 << 20) < size < 128 << 20 for folder, size in zip(folders, sizes, strict=True))
    bundles.budget = max(sizes)
    served = serve(bundles)
    for folder in (*folders, folders[0]):
        with arriero.load(folder, threads=1) as lone:
            text = lone.generate(HELLO, max_tokens=3).text
        assert ask(served, folder.name).json()["choices"][0]["message"]["content"] == text
        assert [name for name, bundle in bundles.by_name.items() if bundle.session] == [folder.name]
    shutil.rmtree(folders[1])
    shutil.copytree(workshop / "bundles" / "fp32", folders[1])
    answer = ask(served, "int8")
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert "cannot be opened" in answer.text
    assert "was replaced" not in answer.text
    assert "the bundle was replaced since the server was started" in caplog.text
    with pytest.raises(ArrieroError, match=r"no room for fp32 \(.*\), int8 \(.*lower --prefix-cache"):
        open_bundles(folders, 1, None, 1 << 20, room(1 << 20))


def test_a_bundle_larger_than_the_memory_keeps_below_it_where_its_backend_can(tvm_workshop: Path, serve: Serve) -> None:
    folder = tvm_workshop / "bundles" / "fp32"
    bundles = open_bundles([folder], 1, 2, None, room(115 << 20))
    served = serve(bundles)
    with arriero.load(folder, threads=1) as lone:
        text = lone.generate(HELLO, max_tokens=3).text
    assert served.openai().chat.completions.create(model="fp32", **ASK).choices[0].message.content == text
    (bundle,) = bundles.by_name.values()
    assert bundle.session is not None
    assert isinstance(bundle.session.backend, CapsMemory)
    assert bundle.session.stats().experts.layers
    assert bundle.nbytes == bundles.budget


def test_a_bundle_that_cannot_be_opened_later_says_so(serve: Serve, toys: Toys, caplog: Any) -> None:
    def fail() -> Session:
        raise ArrieroError("a secret path is gone", where="/secret")

    toys.bundles[0].opener = fail
    served = serve(Bundles(toys.bundles, 1))
    caplog.set_level(logging.INFO, "arriero.server")
    with pytest.raises(openai.InternalServerError, match="The bundle a cannot be opened"):
        served.openai().chat.completions.create(model="a", **ASK)
    assert "a secret path is gone" in caplog.text
    assert ask(served, "b").status_code == 200
