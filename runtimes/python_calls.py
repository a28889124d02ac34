"""Forced calls in Llama 4's Python dialect, `[f(a=1), g(b="x")]`, as a grammar in Lark's notation.

Arguments are literals of Python: True, False, None, lists, dicts with keys in quotes, numbers, texts. Texts and bounded
numbers are those of JSON, whose spelling (with the escapes that `OPTIONS` allow) means the same in Python.
"""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from arriero.runtimes.forced_calls import NO_PARAMETERS, ForcedCalls
from arriero.runtimes.json_schema import OPTIONS, REMARKS, enforceable

ANY_DEPTH = 4  # of lists and dicts in an argument that may be anything
# So many digits that neither Python's limit on whole numbers nor infinity is reached.
_NUMBERS = r"""
INTEGER: /-?(0|[1-9][0-9]{0,17})/
NUMBER: /-?(0|[1-9][0-9]{0,17})(\.[0-9]{1,17})?([eE][-+]?[0-9]{1,2})?/
"""
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SIMPLE = {"boolean": '("True" | "False")', "null": '"None"', "integer": "INTEGER", "number": "NUMBER"}


def python_grammar(calls: ForcedCalls) -> str | None:
    """The grammar, or None where Python has no spelling for a function's or an argument's name, or this for a schema.

    Where a schema says more of a value than is known here, the value is spelled as JSON: with true, false and null.
    """
    try:
        return _Grammar().whole(calls)
    except _Unspeakable:
        return None


class _Unspeakable(Exception):
    """There is no such grammar."""


class _Grammar:
    """The rules so far; `_root` is the schema that references of the function at hand lead into."""

    def __init__(self) -> None:
        self._rules: list[str] = []
        self._numbers = iter(range(1 << 30))
        self._root: Mapping[str, Any] = {}
        self._references: dict[str, str] = {}
        self._any: str | None = None

    def whole(self, calls: ForcedCalls) -> str:
        """The grammar of all functions."""
        call = self._rule(" | ".join(self._call(one) for one in calls.functions))
        more = f' (", " {call}){{0,{calls.most - 1}}}' if calls.most > 1 else ""
        return f'start: "[" {call}{more} "]"\n' + "\n".join(self._rules) + _NUMBERS

    def _rule(self, body: str) -> str:
        name = f"r{next(self._numbers)}"
        self._rules.append(f"{name}: {body}")
        return name

    def _call(self, function: Mapping[str, Any]) -> str:
        name, parameters = function["name"], function.get("parameters") or NO_PARAMETERS
        if not all(_is_name(part) for part in name.split(".")):
            raise _Unspeakable
        if not isinstance(parameters, Mapping) or not _keys(parameters) <= _OBJECT:
            raise _Unspeakable
        if parameters.get("type", "object") != "object":
            raise _Unspeakable
        self._root, self._references = parameters, {}
        arguments = self._members(parameters, lambda key: f"{key}=" if _is_name(key) else None)
        return self._rule(f'"{name}(" {arguments} ")"')

    def _members(self, schema: Mapping[str, Any], begin: Callable[[str], str | None]) -> str:
        """What an object's members come to, in the order of its properties; `begin` spells what is before a value.

        No others are written: a schema that leaves them open is met without.
        """
        properties, required = schema.get("properties", {}), schema.get("required", ())
        if not isinstance(properties, Mapping) or not isinstance(required, list | tuple):
            raise _Unspeakable
        if any(not isinstance(name, str) or name not in properties for name in required):
            raise _Unspeakable
        after, first = '""', '""'  # what may follow a member, and what may be there at all
        for name, below in reversed([*properties.items()]):
            start = begin(name)
            if start is None:
                raise _Unspeakable
            member = self._rule(f"{_quoted(start)} {self._value(below)}")
            if name in required:
                first = self._rule(f"{member} {after}")
                after = self._rule(f'", " {member} {after}')
            else:
                first = self._rule(f"{member} {after} | {first}")
                after = self._rule(f'(", " {member})? {after}')
        return first

    def _value(self, schema: Any) -> str:
        """What a value of `schema` is spelled as: an item of a rule."""
        if schema is True or (isinstance(schema, Mapping) and not _keys(schema)):
            return self._anything()
        if not isinstance(schema, Mapping):
            raise _Unspeakable
        keys, kind = _keys(schema), schema.get("type")
        if "const" in keys and keys <= {"const", "type"}:
            return self._one_of([schema["const"]], kind)
        if "enum" in keys and keys <= {"enum", "type"} and isinstance(schema["enum"], list | tuple):
            return self._one_of(schema["enum"], kind)
        if keys == {"$ref"}:
            return self._reference(schema["$ref"])
        if keys == {"anyOf"} and isinstance(schema["anyOf"], list | tuple) and schema["anyOf"]:
            return self._rule(" | ".join(self._value(one) for one in schema["anyOf"]))
        if isinstance(kind, list) and keys == {"type"} and kind:
            return self._rule(" | ".join(self._value({"type": one}) for one in kind))
        if isinstance(kind, str):
            if keys == {"type"} and kind in _SIMPLE:
                return _SIMPLE[kind]
            if kind == "array" and keys <= {"type", "items", "minItems", "maxItems"}:
                return self._array(schema)
            if kind == "object" and keys <= _OBJECT:
                return self._object(schema)
        return self._json(schema)

    def _json(self, schema: Mapping[str, Any]) -> str:
        """A value that is spelled as JSON spells it, and held to all of its schema."""
        if any("$ref" in text for text in _every_key(schema)):
            raise _Unspeakable
        return self._rule(f"%json {json.dumps({**enforceable(schema), 'x-guidance': OPTIONS})}")

    def _one_of(self, values: Sequence[Any], kind: Any) -> str:
        allowed = [value for value in values if kind is None or _is_of(value, kind)]
        if not allowed:
            raise _Unspeakable
        return self._rule(" | ".join(_quoted(_literal(value)) for value in allowed))

    def _reference(self, path: Any) -> str:
        """The rule of what `path`, such as `#/$defs/address`, leads to; it may lead back to itself."""
        if not isinstance(path, str) or not path.startswith("#/"):
            raise _Unspeakable
        if path not in self._references:
            target: Any = self._root
            for step in path[2:].split("/"):
                if not isinstance(target, Mapping) or step not in target or set(step) & set("~%"):
                    raise _Unspeakable
                target = target[step]
            self._references[path] = f"r{next(self._numbers)}"
            self._rules.append(f"{self._references[path]}: {self._value(target)}")
        return self._references[path]

    def _array(self, schema: Mapping[str, Any]) -> str:
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        if not _is_count(least) or not (most is None or _is_count(most)) or (most is not None and most < least):
            raise _Unspeakable
        if most == 0:
            return '"[]"'
        more = f"{{{max(least - 1, 0)},{'' if most is None else most - 1}}}"
        item = self._value(schema.get("items", True))
        items = f'{item} (", " {item}){more}'
        return self._rule(f'"[" {items} "]"' if least else f'"[" ({items})? "]"')

    def _object(self, schema: Mapping[str, Any]) -> str:
        if schema.get("properties") or schema.get("additionalProperties") is False:
            return self._rule(f'"{{" {self._members(schema, lambda key: f"{_literal(key)}: ")} "}}"')
        if schema.get("required"):
            raise _Unspeakable
        return self._open_object(self._value(schema.get("additionalProperties", True)))

    def _open_object(self, value: str) -> str:
        entry = self._rule(f'{self._json({"type": "string"})} ": " {value}')
        return self._rule(f'"{{" ({entry} (", " {entry})*)? "}}"')

    def _anything(self) -> str:
        """The rule of any value, lists and dicts in it to a bounded depth."""
        if self._any is None:
            simple = f"{self._json({'type': 'string'})} | NUMBER | {_SIMPLE['boolean']} | {_SIMPLE['null']}"
            self._any = self._rule(simple)
            for _ in range(ANY_DEPTH):
                array = self._rule(f'"[" ({self._any} (", " {self._any})*)? "]"')
                self._any = self._rule(f"{simple} | {array} | {self._open_object(self._any)}")
        return self._any


_OBJECT = {"type", "properties", "required", "additionalProperties", "$defs", "definitions"}


def _keys(schema: Mapping[str, Any]) -> set[str]:
    """What a schema says, but for remarks."""
    return {*schema} - REMARKS


def _every_key(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, below in value.items():
            yield str(key)
            yield from _every_key(below)
    elif isinstance(value, list | tuple):
        for below in value:
            yield from _every_key(below)


def _is_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None and not keyword.iskeyword(text)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_of(value: Any, kind: Any) -> bool:
    """Whether `value` is of the JSON type `kind`, or of one of a list of them."""
    if isinstance(kind, list):
        return any(_is_of(value, one) for one in kind)
    if isinstance(value, bool) or value is None:
        return bool(kind == ("null" if value is None else "boolean"))
    if isinstance(value, int | float):
        return kind == "number" or (kind == "integer" and value == int(value))
    return bool({"string": str, "array": list, "object": dict}.get(kind) is type(value))


def _literal(value: Any) -> str:
    """A JSON value as Python writes it, on one line."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(below)}" for key, below in value.items()) + "}"
    return repr(value)


def _quoted(text: str) -> str:
    """A text as Lark's notation has it."""
    return json.dumps(text, ensure_ascii=False)
