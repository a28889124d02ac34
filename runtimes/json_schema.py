"""A JSON schema in the words that llguidance enforces to the letter, and what it would enforce in part only.

A schema that llguidance takes may still let through what it forbids: the escapes of a string may spell a name that is
ruled out, days of the calendar and leap seconds are not told apart, `\\s` is not JavaScript's, a name that is written
twice counts twice. Each is mended where the schema can say it otherwise, and refused where it cannot.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from arriero.errors import ArrieroError
from arriero.runtimes.repetitions import check_regex

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

# What llguidance compiles in about a second, measured on two cores; its time grows with the square of most of these.
MOST_TEXT = 1 << 16  # characters of a schema without its remarks, or of choices together
MOST_PATTERN = 1 << 13  # characters of a regular expression, or of all those of a schema
MOST_PROPERTIES = 1000  # of one object
MOST_ENTRIES = {"properties": 2000, "patternProperties": 64, "anyOf, oneOf and allOf": 1000}  # of a whole schema
_BRANCHES = ("anyOf", "oneOf", "allOf")
REMARKS = {"title", "description", "default", "examples", "$comment"}

# Between JSON's tokens: a space, or a line and its indentation. Any number would let a model write spaces to the end.
SPACES = r"(?: |\n {0,20})?"
# A schema of a stranger's sets none of these itself. With `u` among the escapes an answer could write the name "a" as
# "\u0061" and give it a value of a type that is forbidden.
OPTIONS: JsonCompileOptions = {
    "whitespace_pattern": SPACES,
    "item_separator": ",",
    "key_separator": ":",
    "coerce_one_of": False,
    "lenient": False,
    "json_allowed_escapes": 'nrbtf\\"',
}

_LEAP = r"(?:\d\d(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)-02-29"
_DAY = (
    r"(?:\d{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\d|30)"
    rf"|02-(?:0[1-9]|1\d|2[0-8]))|{_LEAP})"
)
# What a format also comes to. JSON Schema leaves those of numbers to OpenAPI, and llguidance knows them not.
_STRICTER: dict[str, dict[str, Any]] = {
    "date": {"pattern": f"^{_DAY}$"},
    "time": {"pattern": "^..:..:[0-5]"},
    "date-time": {"pattern": f"^{_DAY}[Tt]..:..:[0-5]"},
}
_NUMBERS: dict[str, dict[str, Any]] = {
    "int32": {"minimum": -(2**31), "maximum": 2**31 - 1},
    "int64": {"minimum": 1 - 10**18, "maximum": 10**18 - 1},  # llguidance counts no further
    "float": {},
    "double": {},
}

_SPACE = "\t-\r \xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff"  # JavaScript's
_CLASSES = {"s": f"[{_SPACE}]", "S": f"[^{_SPACE}]"}

# Characters that JSON spells by number alone, and how a pattern names them. llguidance leaves them out of a text.
_NUMBERED = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")
_NAMED = re.compile(
    r"\\(?:[av]|(?:x|u00)(?:0[0-7bBeEfF]|1[0-9a-fA-F]|7[fF])|[xu]\{0*(?:[0-7bBeEfF]|1[0-9a-fA-F]|7[fF])\})"
)
_WIDE_CLASS = re.compile(
    r"\[(?:\^|[^\]\\]-|\\[^\]]{1,6}-)(?:\\.|[^\]\\])*\]"
)  # one that holds more than such characters

_SCHEMAS_BY_NAME = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
_VALUES = {"const", "enum", "default", "examples"}


def enforceable(schema: Mapping[str, Any]) -> dict[str, Any]:
    """`schema` for llguidance. Raises ArrieroError with everything in it that an answer cannot be held to."""
    try:
        check_size(schema)
        problems = [*_problems(schema, "")]
        if problems:
            reason, remedy = "; ".join(problems), "Change it, or ask without it"
            raise ArrieroError(f"json_schema cannot be enforced: {reason}", remedy=remedy)
        return _rewrite(schema)
    except RecursionError:
        raise ArrieroError("json_schema is nested too deeply", remedy="Flatten it, by $defs for instance") from None


def check_text(name: str, text: str, most: int) -> None:
    """Refuse a text of `name` that is longer than `most`."""
    if len(text) > most:
        raise ArrieroError(f"{name} has {len(text):,} characters", expected=f"at most {most:,}", remedy="Simplify it")


def check_size(schema: Mapping[str, Any]) -> None:
    """Refuse a schema that would take too long to compile."""
    check_text("json_schema", json.dumps(_without_remarks(schema), ensure_ascii=False), MOST_TEXT)
    counts, patterns = dict.fromkeys(MOST_ENTRIES, 0), [""]
    for one in _schemas(schema):
        properties = len(_mapping(one.get("properties")))
        if properties > MOST_PROPERTIES:
            raise _too_many("properties of one object", properties, MOST_PROPERTIES)
        more = _mapping(one.get("patternProperties"))
        branches = sum(len(one[key]) for key in _BRANCHES if isinstance(one.get(key), list | tuple))
        for name, count in zip(MOST_ENTRIES, (properties, len(more), branches), strict=True):
            counts[name] += count
        counts["properties"] += sum(_members(one.get(key)) for key in ("const", "enum"))
        patterns += (pattern for pattern in (one.get("pattern"), *more) if isinstance(pattern, str))
    for name, most in MOST_ENTRIES.items():
        if counts[name] > most:
            raise _too_many(f"entries of {name}", counts[name], most)
    check_text("json_schema's patterns", "".join(patterns), MOST_PATTERN)
    check_regex("json_schema's patterns", "|".join(patterns))


def _members(value: Any) -> int:
    """How many members the objects in `value` have together."""
    below = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return (len(value) if isinstance(value, Mapping) else 0) + sum(map(_members, below))


def _too_many(what: str, count: int, most: int) -> ArrieroError:
    return ArrieroError(f"json_schema has {count:,} {what}", expected=f"at most {most:,}", remedy="Simplify it")


def _schemas(schema: Any) -> Iterator[Mapping[str, Any]]:
    """Whatever may be a schema in `schema`, itself first, however deep."""
    if isinstance(schema, Mapping):
        yield schema
        for _, below in _below(schema, ""):
            yield from _schemas(below)


def _without_remarks(schema: Any) -> Any:
    """`schema` without what an answer is not held to."""
    if not isinstance(schema, Mapping):
        return [_without_remarks(entry) for entry in schema] if isinstance(schema, list | tuple) else schema
    kept: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _SCHEMAS_BY_NAME and isinstance(value, Mapping):
            kept[key] = {name: _without_remarks(below) for name, below in value.items()}
        elif key not in REMARKS:
            kept[key] = value if key in _VALUES else _without_remarks(value)
    return kept


def _problems(schema: Any, at: str) -> Iterator[str]:
    """What in the schema at the path `at` would be enforced in part only."""
    if not isinstance(schema, Mapping):
        return
    least, required = schema.get("minProperties", 0), schema.get("required", ())
    names = len(set(map(str, required))) if isinstance(required, list | tuple) else 0
    if isinstance(least, int) and least > names + 1:
        yield f"{at}minProperties asks for names of the answer's own, and one that is written twice would count twice"
    for key in ("const", "enum"):
        if any(_NUMBERED.search(text) for text in _texts(schema.get(key))):
            yield f"{at}{key} has a control character"
    patterns = [schema.get("pattern"), *_mapping(schema.get("patternProperties"))]
    for pattern in patterns:
        if isinstance(pattern, str) and any(form.search(_WIDE_CLASS.sub("", pattern)) for form in (_NUMBERED, _NAMED)):
            yield f"{at}the pattern {pattern!r:.60} names a control character"
    for path, below in _below(schema, at):
        yield from _problems(below, path)


def _rewrite(schema: Any) -> Any:
    """`schema` with exact formats and JavaScript's spaces."""
    if not isinstance(schema, Mapping):
        return [_rewrite(entry) for entry in schema] if isinstance(schema, list | tuple) else schema
    written: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _SCHEMAS_BY_NAME and isinstance(value, Mapping):
            renamed = _spaces if key == "patternProperties" else str
            written[key] = {renamed(name): _rewrite(below) for name, below in value.items()}
        elif key in _VALUES:
            written[key] = value
        else:
            written[key] = _spaces(value) if key == "pattern" and isinstance(value, str) else _rewrite(value)
    named, others = schema.get("format"), written.get("allOf", [])
    more = (_STRICTER | _NUMBERS).get(named) if isinstance(named, str) else None
    if more is not None and isinstance(others, list):
        written["allOf"] = [*others, more]
        if named in _NUMBERS:
            del written["format"]
    return written


def _spaces(pattern: str) -> str:
    return re.sub(r"\\(.)", lambda escape: _CLASSES.get(escape[1], escape[0]), pattern, flags=re.DOTALL)


def _below(schema: Mapping[str, Any], at: str) -> Iterator[tuple[str, Any]]:
    """Whatever may be a schema in `schema`, with its path."""
    for key, value in schema.items():
        if key in _VALUES:
            continue
        entries = _mapping(value).items() if key in _SCHEMAS_BY_NAME else [(None, value)]
        for name, entry in entries:
            path = f"{at}{key}." if name is None else f"{at}{key}.{name}."
            for below in entry if isinstance(entry, list | tuple) else (entry,):
                yield path, below


def _texts(value: Any) -> Iterator[str]:
    """The texts among the values of `value`."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for below in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(below)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
