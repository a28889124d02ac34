"""The server's paths as one ASGI app over sessions."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from arriero.runtimes.backend import Ints
from arriero.runtimes.request import Request as EngineRequest
from arriero.runtimes.server.answers import Answers, Load, engine_requests, until_gone
from arriero.runtimes.server.anthropic_messages import AnthropicCount, AnthropicMessage, anthropic_response
from arriero.runtimes.server.bundles import Bundles
from arriero.runtimes.server.chat_completions import ChatCompletion
from arriero.runtimes.server.completions import Completion
from arriero.runtimes.server.entry_limit import EntryLimit
from arriero.runtimes.server.errors import RefusalError, told_refusal
from arriero.runtimes.server.fields import Fields
from arriero.runtimes.server.guard import Guard
from arriero.runtimes.server.messages import MessageReader
from arriero.runtimes.server.metrics import Metrics
from arriero.runtimes.server.models import Model, Models
from arriero.runtimes.server.openapi import openapi_document
from arriero.runtimes.server.options import ServerOptions
from arriero.runtimes.server.page import PATH as PAGE
from arriero.runtimes.server.page import page_response
from arriero.runtimes.server.picture_fetcher import PictureFetcher
from arriero.runtimes.server.pictures import PictureReader
from arriero.runtimes.server.responses import ResponseRequest
from arriero.runtimes.server.spans import AnswerSpan
from arriero.runtimes.server.sse import HEADERS
from arriero.runtimes.server.workers import Workers
from arriero.runtimes.settings import read_settings
from arriero.strict_json import check_characters, parse_json

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
HALVES = re.compile(rb"\\u[dD][89a-fA-F]")  # of surrogate pairs, as JSON escapes them
SLOW_SECONDS = 10.0  # for a client to read what is left of a stream whose time is over
T = TypeVar("T")
Handler = Callable[[Request], Awaitable[Response]]
Asked = ChatCompletion | Completion | AnthropicMessage | ResponseRequest


class Server:
    """What the paths share: the bundles and models, the limits, the counters."""

    def __init__(self, bundles: Bundles, options: ServerOptions) -> None:
        """Serve `bundles`."""
        self.bundles, self.models, self.options = bundles, Models(bundles), options
        self.metrics, self.load = Metrics(bundles), Load(options.most_requests)
        self._fetcher = PictureFetcher(options)
        self._encoding = Workers(2, "arriero-encode")  # pictures take memory until the engine has them
        self._compiling = Workers(2, "arriero-forms")

    async def health(self, _: Request) -> Response:
        """Whether requests are answered."""
        stopping = self.load.stopping
        return JSONResponse({"status": "stopping" if stopping else "ok"}, 503 if stopping else 200)

    async def show_page(self, _: Request) -> Response:
        """The built-in page."""
        return page_response()

    async def list_models(self, _: Request) -> Response:
        """The models by name."""
        return JSONResponse(self.models.entries())

    async def show_model(self, request: Request) -> Response:
        """One model."""
        return JSONResponse(self.models.entry(request.path_params["name"]))

    async def show_openapi(self, _: Request) -> Response:
        """The paths, as an OpenAPI document."""
        return JSONResponse(openapi_document(self.models, self.options))

    async def show_metrics(self, _: Request) -> Response:
        """The counters."""
        return Response(self.metrics.text(), media_type=METRICS_TYPE)

    async def tokenize(self, request: Request) -> Response:
        """The tokens of a text, or of messages with what the chat template adds."""
        fields = Fields(await self._body(request))
        model, prompt, messages = self.models.get(fields.text("model")), fields.text("prompt"), fields.items("messages")
        fields.refuse_others()
        if (prompt is None) == (messages is None):
            raise fields.refusal("prompt", "or messages is expected, one of the two")
        reader = MessageReader(self.options, EntryLimit(model.bundle.context))
        read = [] if messages is None else reader.read(messages)

        def encode() -> Ints:
            if prompt is not None:
                return model.session.processor.tokenize(prompt, context=model.bundle.context)
            return model.session.encode(read).input_ids

        ids = await self._encode_alone(model, reader.pictures, encode)
        return JSONResponse({"tokens": ids.tolist(), "count": len(ids), "max_model_len": model.bundle.context})

    async def count_tokens(self, request: Request) -> Response:
        """How many tokens a prompt of Anthropic's API has."""
        asked = AnthropicCount(await self._body(request), self.models, self.options)
        (prompt,) = await self._encode_alone(asked.model, asked.pictures, asked.encode)
        return JSONResponse({"input_tokens": len(prompt.input_ids)})

    def answering(self, kind: type[Asked]) -> Handler:
        """The handler of a path whose requests are of this `kind`."""

        async def handle(request: Request) -> Response:
            asked = kind(await self._body(request), self.models, self.options)
            self.load.take(asked.count)
            deadline = asyncio.get_running_loop().time() + self.options.request_seconds
            with ExitStack() as over:  # when the request is, however it ends
                over.callback(self.load.give, asked.count)
                span = over.enter_context(AnswerSpan(request, asked.operation, asked.asked))
                over.enter_context(self.bundles.using(asked.asked.model.bundle))
                async with asyncio.timeout_at(deadline):
                    requests = await until_gone(request, partial(self._prepare, asked))
                answers = Answers.begin(asked.asked, requests, self.metrics, deadline)
                span.answers = answers
                over.callback(answers.close)
                if asked.asked.stream:
                    return _Stream(asked.lines(answers), over.pop_all(), deadline + SLOW_SECONDS)
                results = await until_gone(request, answers.wait)
                return JSONResponse(asked.whole(answers, results))

        return handle

    async def _prepare(self, asked: Asked) -> list[EngineRequest]:
        """Have the bundle open, the prompts encoded with the pictures that they show, and the answers' form compiled.

        None of it on the event loop; who asks for a form waits for others' forms, and nobody else does.
        """
        prompts = await self._encode(asked.asked.model, asked.pictures, asked.encode)
        settings = [read_settings({**asked.asked.settings_of(n), **asked.shown}) for n in range(asked.asked.count)]
        workers = self._encoding if settings[0].form.is_free else self._compiling
        return await workers.run(partial(engine_requests, asked.asked.model, prompts, settings))

    async def _encode_alone(self, model: Model, pictures: PictureReader, encode: Callable[[], T]) -> T:
        """What `encode` makes of a request that asks for no answer."""
        with self.bundles.using(model.bundle):
            async with asyncio.timeout(self.options.request_seconds):
                return await self._encode(model, pictures, encode)

    async def _encode(self, model: Model, pictures: PictureReader | None, encode: Callable[[], T]) -> T:
        """What `encode` makes of a request once its bundle is open and what it shows is here."""
        await self.bundles.open(model.bundle)
        if pictures is not None:
            await pictures.fetch(self._fetcher)
        return await self._encoding.run(encode)

    async def _body(self, request: Request) -> Any:
        """The JSON that a request brings and says it is: pages of other origins may not send such a body unasked."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise RefusalError(415, "The body's content type is not application/json.")
        try:
            async with asyncio.timeout(self.options.body_seconds):
                content = await request.body()
        except TimeoutError:
            raise RefusalError(408, "The body did not come in time.") from None
        body = parse_json(content, "the body", "Send one JSON object")
        if HALVES.search(content):  # no answer could say such a name or text, not even to refuse it
            try:
                check_characters(json.dumps(body, ensure_ascii=False), "the body")
            except RecursionError:
                raise RefusalError(400, "The body is nested too deeply.") from None
        return body


class _Stream(StreamingResponse):
    """Lines as they come; whatever ends them, also before the first, `over` is closed.

    A client that has not read them by the `deadline` is left.
    """

    def __init__(self, lines: AsyncIterator[str], over: ExitStack, deadline: float) -> None:
        super().__init__(lines, media_type="text/event-stream", headers=HEADERS)
        self._over, self._deadline = over, deadline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._over, suppress(TimeoutError):
            async with asyncio.timeout_at(self._deadline):
                await super().__call__(scope, receive, send)


def create_app(bundles: Bundles, options: ServerOptions) -> tuple[ASGIApp, Server]:
    """The app that answers from `bundles`, and what its paths share."""
    server = Server(bundles, options)
    routes = [
        Route(PAGE, _refusing(server.show_page)),
        Route("/health", _refusing(server.health)),
        Route("/openapi.json", _refusing(server.show_openapi)),
        Route("/metrics", _refusing(server.show_metrics)),
        Route("/tokenize", _refusing(server.tokenize), methods=["POST"]),
        Route("/v1/models", _refusing(server.list_models)),
        Route("/v1/models/{name:path}", _refusing(server.show_model)),
        Route("/v1/chat/completions", _refusing(server.answering(ChatCompletion)), methods=["POST"]),
        Route("/v1/messages", _refusing(server.answering(AnthropicMessage), anthropic_response), methods=["POST"]),
        Route("/v1/messages/count_tokens", _refusing(server.count_tokens, anthropic_response), methods=["POST"]),
        Route("/v1/responses", _refusing(server.answering(ResponseRequest)), methods=["POST"]),
        Route("/v1/completions", _refusing(server.answering(Completion)), methods=["POST"]),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _no_such})
    paths = frozenset(route.path for route in routes if "{" not in route.path)
    return Guard(app, options, server.metrics, paths), server


def _refusing(handler: Handler, respond: Callable[[RefusalError], Response] = RefusalError.response) -> Handler:
    """`handler` whose errors are answers as `respond` has them; faults of ours are told to the log alone."""

    async def handle(request: Request) -> Response:
        try:
            return await handler(request)
        except Exception as error:
            return respond(told_refusal(error, request.state.request_id))

    return handle


async def _no_such(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = {404: "There is no such path.", 405: "The path does not take this method."}
    response = RefusalError(error.status_code, known.get(error.status_code, str(error.detail))).response()
    response.headers.update(error.headers or {})  # the methods that a path takes
    return response
