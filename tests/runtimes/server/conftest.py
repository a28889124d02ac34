"""Servers on a port of this machine, over the toy and over real bundles, and the official client for them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest

from arriero.runtimes.processor.processor import Processor
from arriero.runtimes.scheduler import EngineLimits
from arriero.runtimes.server.app import create_app
from arriero.runtimes.server.bundles import Bundle, Bundles
from arriero.runtimes.server.options import ServerOptions
from arriero.runtimes.server.serve import HttpServer
from arriero.runtimes.session import Session


class Served:
    """A server that listens, in a thread of its own."""

    def __init__(self, bundles: Bundles, options: ServerOptions) -> None:
        app, self.shared = create_app(bundles, options)
        self.http = HttpServer(app, options, self.shared.load)
        self.thread = threading.Thread(target=lambda: asyncio.run(self.http.serve()))
        self.thread.start()
        while not self.http.started:
            assert self.thread.is_alive()
            time.sleep(0.005)
        host, port = self.http.servers[0].sockets[0].getsockname()[:2]
        self.url = f"http://{host}:{port}"

    def openai(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=120)

    def web(self, **headers: str) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers=headers, timeout=120)

    def stop(self) -> None:
        self.http.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()


def open_bundle(name: str, session: Session) -> Bundle:
    """A bundle that is open already."""
    bundle = Bundle(name, session.context, session.adapters, session.identity, 0, lambda: session)
    bundle.open()
    return bundle


Serve = Callable[..., Served]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start servers over bundles, or sessions by name, with options by name; all are stopped and closed afterwards."""
    running: list[tuple[Served, Bundles]] = []

    def start(sessions: Bundles | Mapping[str, Session], **options: Any) -> Served:
        if not isinstance(sessions, Bundles):
            sessions = Bundles([open_bundle(name, session) for name, session in sessions.items()])
        served = Served(sessions, replace(ServerOptions(port=0), **options))
        running.append((served, sessions))
        return served

    yield start
    for served, bundles in running:
        served.stop()
        bundles.close()


def let_say(toy: Any, session: Session, prompt: int, text: str) -> None:
    """Let the toy answer prompts of so many tokens with `text`."""
    tokens, forward = [*session.processor.tokenize(text).tolist(), 257], type(toy).forward

    def saying(embeds: Any, positions: Any, cache: Any, index: Any, captures: bool = False) -> Any:
        out = forward(toy, embeds, positions, cache, index, captures)
        out.logits[...] = 0
        for row, length in enumerate(cache.lengths.tolist()):
            out.logits[row, :, tokens[min(max(length - prompt, 0), len(tokens) - 1)]] = 50
        return out

    toy.forward = saying


@pytest.fixture
def toy_session(toy: Any, processor: Processor) -> Session:
    limits = EngineLimits(4, 400, None, 1 << 24)
    return Session(toy, processor, 400, 4, ("pirate",), limits=limits, identity="0123456789abcdef")


@pytest.fixture
def served(serve: Serve, toy_session: Session) -> Served:
    return serve({"toy": toy_session})
