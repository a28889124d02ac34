"""JSON read into dataclasses, by their annotations: what is missing or of another type is named with its place."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from arriero.errors import ArrieroError

T = TypeVar("T")
PLAIN = (str, int, float, bool)


def decode(kind: type[T], value: Any, where: str, remedy: str) -> T:
    """`value`, as `json.loads` gives it, as a `kind`: a dataclass, or what its fields may be.

    Those are str, int, float, bool, `dict[str, X]`, `tuple[X, ...]`, another dataclass, and any of them or None. Keys
    that no field has are left out. Raises ArrieroError with the place, as in `manifest.json:target.context`.
    """
    return cast(T, _decode(kind, value, where, remedy))


def _decode(kind: Any, value: Any, where: str, remedy: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        inner = next(argument for argument in arguments if argument is not type(None))
        return None if value is None else _decode(inner, value, where, remedy)
    if origin is dict:
        entries = _expect(Mapping, value, "a mapping", where, remedy)
        return {str(key): _decode(arguments[1], entry, f"{where}.{key}", remedy) for key, entry in entries.items()}
    if origin is tuple:
        items = _expect(list, value, "a list", where, remedy)
        return tuple(_decode(arguments[0], item, f"{where}[{number}]", remedy) for number, item in enumerate(items))
    if is_dataclass(kind):
        return _record(kind, _expect(Mapping, value, "a mapping", where, remedy), where, remedy)
    assert kind in PLAIN, f"{where}: no JSON value is a {kind}"
    # True is an int to Python, and 3 is a float to JSON
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, bool) and kind is not bool:
        raise _wrong(value, kind.__name__, where, remedy)
    return _expect(kind, value, f"a value of type {kind.__name__}", where, remedy)


def _record(kind: Any, value: Mapping[str, Any], where: str, remedy: str) -> Any:
    fields = {}
    for name, hint, required in _fields(kind):
        if name in value:
            fields[name] = _decode(hint, value[name], f"{where}.{name}", remedy)
        elif required:
            raise ArrieroError(f"the key {name!r} is missing", where=where, remedy=remedy)
    return kind(**fields)


@cache
def _fields(kind: Any) -> tuple[tuple[str, Any, bool], ...]:
    """Name, type, and whether it has no default, of each field."""
    hints = get_type_hints(kind)
    return tuple(
        (each.name, hints[each.name], each.default is MISSING and each.default_factory is MISSING)
        for each in fields(kind)
    )


def _expect(kind: Any, value: Any, expected: str, where: str, remedy: str) -> Any:
    if not isinstance(value, kind):
        raise _wrong(value, expected, where, remedy)
    return value


def _wrong(value: Any, expected: str, where: str, remedy: str) -> ArrieroError:
    shown = repr(value)
    shown = shown if len(shown) <= 40 else f"{shown[:40]}.."
    return ArrieroError(f"an entry has the wrong shape: {shown}", where=where, expected=expected, remedy=remedy)
