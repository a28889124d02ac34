"""The server's paths as an OpenAPI document, for tools that read one."""

from __future__ import annotations

from typing import Any

from arriero.runtimes.server.models import Models
from arriero.runtimes.server.openapi_bodies import bodies
from arriero.runtimes.server.openapi_schemas import OBJECT, TEXT, Schema
from arriero.runtimes.server.options import ServerOptions
from arriero.version import __version__

ERROR: Schema = {
    "type": "object",
    "properties": {"error": {"type": "object", "properties": {"message": TEXT, "type": TEXT}, "required": ["message"]}},
    "required": ["error"],
}
JSON, EVENTS = "application/json", "text/event-stream"
# What each path does, and the types and schemas that it answers with.
POSTS = {
    "/v1/chat/completions": "Answers messages as OpenAI's API has it",
    "/v1/completions": "Goes on with texts as they stand",
    "/v1/responses": "Answers items as OpenAI's newer API has it; nothing is kept",
    "/v1/messages": "Answers messages as Anthropic's API has it",
    "/v1/messages/count_tokens": "How many tokens the prompt of such messages has",
    "/tokenize": "The tokens of a text, or of messages in the chat template, unless they are far beyond the context",
}
GETS: dict[str, tuple[str, str, Schema]] = {
    "/": ("A page to chat with", "text/html", TEXT),
    "/health": ("Whether requests are taken", JSON, {"type": "object", "required": ["status"]}),
    "/metrics": ("Counters for Prometheus", "text/plain", TEXT),
    "/openapi.json": ("This document", JSON, OBJECT),
    "/v1/models": ("The models", JSON, {"type": "object", "required": ["data"]}),
    "/v1/models/{name}": ("One model", JSON, {"type": "object", "required": ["id"]}),
}
UNSTREAMED = ("/tokenize", "/v1/messages/count_tokens")


def openapi_document(models: Models, options: ServerOptions) -> dict[str, Any]:
    """The document of a server with `models`."""
    schemas = bodies(models, options)
    paths: dict[str, Any] = {}
    for path, (summary, kind, schema) in GETS.items():
        paths[path] = {"get": _operation(summary, {kind: {"schema": schema}})}
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "enum": models.names}}
    paths["/v1/models/{name}"]["get"]["parameters"] = [name]
    for path, summary in POSTS.items():
        content: dict[str, Any] = {JSON: {"schema": OBJECT}}
        if path not in UNSTREAMED:
            content[EVENTS] = {}
        body = {"required": True, "content": {JSON: {"schema": schemas[path]}}}
        paths[path] = {"post": {**_operation(summary, content), "requestBody": body}}
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "arriero", "version": __version__},
        "paths": paths,
    }
    if options.api_key is not None:
        document["components"] = {
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
            }
        }
        document["security"] = [{"bearer": []}, {"header": []}]
        paths["/health"]["get"]["security"] = []
    return document


def _operation(summary: str, content: dict[str, Any]) -> dict[str, Any]:
    wrong = {"content": {JSON: {"schema": ERROR}}}
    return {
        "summary": summary,
        "responses": {
            "200": {"description": "The answer", "content": content},
            "4XX": {"description": "Why there is none: what was asked cannot be answered", **wrong},
            "5XX": {"description": "Why there is none: the server is busy, stops, or is at fault", **wrong},
        },
    }
