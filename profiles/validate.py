"""Checks a YAML document against a pydantic model: every mistake a sentence with the file and line of its key."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from arriero.errors import ArrieroError, MachineLacks, nearest
from arriero.profiles.yaml_document import Document, Key

Model = TypeVar("Model", bound=BaseModel)

# A kind of pydantic's errors -> what we say was expected instead.
EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "finite_number": "a finite number",
    "string_type": "text",
    "string_too_short": "some text",
    "tuple_type": "a list, as in [a, b]",
    "list_type": "a list, as in [a, b]",
    "dict_type": "a mapping of `key: value` lines",
    "model_type": "a mapping of `key: value` lines",
    "model_attributes_type": "a mapping of `key: value` lines",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than_equal": "at most {le}",
    "too_short": "a list of {min_length} or more",
    "literal_error": "{expected}",
    "union_tag_invalid": "{expected_tags}",
}


def refusal(error: ArrieroError) -> PydanticCustomError:
    """Carry one of our errors through pydantic, so that it is listed with the others."""
    context = {"what": error.what, "expected": error.expected, "remedy": error.remedy}
    return PydanticCustomError("arriero", "{what}", {**context, "machine": isinstance(error, MachineLacks)})


def validated(document: Document, model: type[Model], context: dict[str, Any] | None = None) -> Model | None:
    """`document` as a `model`; None where it is none, and the document's problems say why."""
    try:
        return model.model_validate(document.data, context=context)
    except ValidationError as error:
        # a list whose entries are all wrong counts as empty, which is not what is wrong with it
        mistakes = [one for one in error.errors(include_url=False) if one["type"] != "too_short" or not one["input"]]
        document.problems += [_sentence(document, model, one) for one in mistakes]
        return None


def _sentence(document: Document, model: type[BaseModel], mistake: ErrorDetails) -> ArrieroError:
    """Say one pydantic error in our words, with its line."""
    loc, kind, value, context = mistake["loc"], mistake["type"], mistake["input"], mistake.get("ctx", {})
    where = document.where(_key(document.data, loc, missing=kind == "missing"))
    if kind == "arriero" and value is not None:
        error = MachineLacks if context["machine"] else ArrieroError
        return error(context["what"], where=where, expected=context["expected"], remedy=context["remedy"])
    if kind == "missing":
        return ArrieroError("is missing", where=where, remedy=_section(model, loc[:-1])[str(loc[-1])].description)
    if kind == "extra_forbidden":
        known = list(_section(model, loc[:-1]))
        return ArrieroError(
            "unknown key", where=where, expected=f"one of {', '.join(known)}", remedy=nearest(str(loc[-1]), known)
        )
    if kind.startswith("union_tag"):
        kinds = [tag for one in _models_at(model, loc) for tag in _kinds(one)]
        tag = context.get("tag")
        what = f"{tag!r} is no kind of scheme" if tag else "has no `kind`"
        return ArrieroError(what, where=where, expected=f"one of {', '.join(kinds)}", remedy=nearest(str(tag), kinds))
    if kind == "value_error":
        return ArrieroError(str(context["error"]), where=where)
    expected = EXPECTED[kind].format(**context) if kind in EXPECTED else mistake["msg"]
    if value is None:
        expected = context.get("expected") or expected
        return ArrieroError("has no value", where=where, expected=expected, remedy="Give one, or remove the key")
    known = expected.replace("'", "").replace(" or ", ", ").split(", ")
    remedy = nearest(str(value), known) if kind == "literal_error" else None
    if value in known:
        remedy = "Write it without quotes"
    shown = repr(value) if len(repr(value)) < 60 else repr(value)[:57] + "..."
    return ArrieroError(f"{shown} is not valid", where=where, expected=expected, remedy=remedy)


def _key(data: Any, loc: Key, missing: bool) -> Key:
    """The key in the file of pydantic's `loc`, which also names kinds of unions and entries of what is no list.

    The last part of a `missing` key is not in the file and belongs to it all the same.
    """
    key: list[str | int] = []
    for number, part in enumerate(loc):
        held = part in data if isinstance(data, dict) else isinstance(data, list) and isinstance(part, int)
        if held:
            data = data[part]
        elif not missing or number < len(loc) - 1:
            continue
        key.append(part)
    return tuple(key)


def _section(model: type[BaseModel], loc: Key) -> dict[str, FieldInfo]:
    """The fields of the mapping at `loc`."""
    return _models_at(model, loc)[0].model_fields


def _models_at(model: type[BaseModel], loc: Key) -> list[type[BaseModel]]:
    """The classes that may describe the mapping at `loc` of a `model`."""
    models = [model]
    for part in loc:
        if isinstance(part, int):
            continue
        inner = [one.model_fields[part].annotation for one in models if part in one.model_fields]
        models = [held for annotation in inner for held in _models_in(annotation)] or [
            one for one in models if part in _kinds(one)
        ]
    return models


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


def _kinds(model: type[BaseModel]) -> tuple[str, ...]:
    """What the field `kind` of one class of a union may say."""
    return get_args(model.model_fields["kind"].annotation) if "kind" in model.model_fields else ()
