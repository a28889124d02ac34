"""What the schemas of several bodies are made of."""

from __future__ import annotations

from typing import Any

from arriero.runtimes.server.answer_fields import MOST_BIASES, MOST_STOPS, MOST_TOP_LOGPROBS

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
NUMBER: Schema = {"type": "number"}
OBJECT: Schema = {"type": "object"}
COUNT: Schema = {"type": "integer", "minimum": 1}


def one_of(*values: Any) -> Schema:
    """One of some values."""
    return {"enum": list(values)}


def record(required: tuple[str, ...] = (), **properties: Schema) -> Schema:
    """An object of these fields and no others."""
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def with_needs(schema: Schema, **needs: tuple[str, Any]) -> Schema:
    """`schema`, some of whose fields need another to have a value."""
    dependent = {
        field: {"properties": {other: {"const": value}}, "required": [other]} for field, (other, value) in needs.items()
    }
    return {**schema, "dependentSchemas": dependent}


def listed(items: Schema, least: int = 0, most: int | None = None) -> Schema:
    """A list of `items`."""
    schema: Schema = {"type": "array", "items": items, "minItems": least}
    return schema if most is None else schema | {"maxItems": most}


def part(kind: str, **properties: Schema) -> Schema:
    """A part of a message's content, by its type."""
    return record(("type", *properties), type=one_of(kind), **properties)


URL: Schema = {"type": "string", "description": "data:image/...;base64,..., or https from a domain that is allowed"}
ARGUMENTS: Schema = {"type": "string", "contentMediaType": "application/json", "examples": ["{}"]}
SCHEMA: Schema = {"type": "object", "description": "a JSON schema"}
FORM_FIELDS = {"name": TEXT, "schema": SCHEMA, "strict": FLAG, "description": TEXT}
FULL: Schema = {"type": "string", "minLength": 1}
STOPS = listed(FULL, 0, MOST_STOPS)
SAMPLING: dict[str, Schema] = {
    "temperature": {"type": "number", "minimum": 0, "default": 1},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "top_k": COUNT,
    "min_p": {"type": "number", "minimum": 0, "maximum": 1},
    "repetition_penalty": {"type": "number", "exclusiveMinimum": 0, "default": 1},
    "presence_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "frequency_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "seed": {"type": "integer"},
    "logit_bias": {
        "type": "object",
        "patternProperties": {"^[0-9]{1,9}$": NUMBER},
        "additionalProperties": False,
        "maxProperties": MOST_BIASES,
    },
    "stop": {"anyOf": [FULL, STOPS]},
}
STREAM: dict[str, Schema] = {"stream": FLAG, "stream_options": record(include_usage=FLAG, include_obfuscation=FLAG)}
FORM: dict[str, Schema] = {
    "response_format": {
        "oneOf": [
            part("text"),
            part("json_object"),
            part("json_schema", json_schema=record(("schema",), **FORM_FIELDS)),
        ]
    },
    "structured_outputs": {
        "oneOf": [
            record((name,), **{name: schema})
            for name, schema in {"json": SCHEMA, "regex": TEXT, "choice": listed(FULL, 1), "grammar": TEXT}.items()
        ]
    },
}
LOGPROBS: Schema = {"type": "integer", "minimum": 0, "maximum": MOST_TOP_LOGPROBS}
