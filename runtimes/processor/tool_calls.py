"""The calls of tools in an answer: Llama 4 writes them as a Python list, as JSON, or as Meta's older tags.

    [get_weather(city="Lima", days=3), get_time()]
    {"type": "function", "name": "get_weather", "parameters": {"city": "Lima"}}
    <function=get_weather>{"city": "Lima"}</function>
    brave_search.call(query="weather in Lima")

An answer is either calls or words: where anything else stands beside them, there are none. Nothing is evaluated.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MOST_CHARACTERS = 200_000  # of an answer that is looked into
MOST_DEPTH = 50  # of an argument
MOST_CALLS = 128

_AROUND = re.compile(
    r"\s*(?:<\|header_start\|>assistant<\|header_end\|>)?\s*(?:<\|python_start\|>)?(?P<calls>.*?)"
    r"(?:<\|python_end\|>)?\s*(?:<\|eom\|>|<\|eot\|>)?\s*",
    re.DOTALL,
)
_TAG = re.compile(r"<function=(?P<name>[^<>{}]+)>\s*")
_BUILTIN = re.compile(r'(?P<name>\w+)\.call\(query="(?P<query>[^"]*)"\)')
_NAMES = {"true": True, "false": False, "null": None}  # as models that think of JSON write them


@dataclass(frozen=True)
class ToolCall:
    """A function that the model asks for, with its arguments by name as JSON has them."""

    name: str
    arguments: dict[str, Any]

    def to_message(self) -> dict[str, Any]:
        """The call as an assistant's message has it in `tool_calls`, and as OpenAI's API gives it."""
        function = {"name": self.name, "arguments": json.dumps(self.arguments, ensure_ascii=False)}
        return {"type": "function", "function": function}


def parse_tool_calls(text: str) -> list[ToolCall]:
    """Give the calls that the answer `text` is made of, in order; none where it is, or also holds, something else.

    What stands around them does not matter: `<|python_start|>` and `<|python_end|>`, spaces, a closing token.
    """
    if len(text) > MOST_CHARACTERS:
        return []
    around = _AROUND.fullmatch(text)
    assert around is not None  # it takes any text
    body = around["calls"].strip()
    try:
        calls = [*_calls(body)]
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return []
    return calls if len(calls) <= MOST_CALLS else []


def _calls(body: str) -> Iterator[ToolCall]:
    """The calls in one of the four forms. Raises ValueError or SyntaxError where it is none of them."""
    if body.startswith("<function="):
        return _tagged(body)
    if builtin := _BUILTIN.fullmatch(body):
        return iter([ToolCall(builtin["name"], {"query": builtin["query"]})])
    if body.startswith("{") or re.match(r"\[\s*\{", body):
        return _from_json(body)
    return _from_python(body)


def _tagged(body: str) -> Iterator[ToolCall]:
    at = 0
    while at < len(body):
        tag = _TAG.match(body, at)
        if tag is None:
            raise ValueError
        arguments, at = json.JSONDecoder(parse_constant=_refuse).raw_decode(body, tag.end())
        yield ToolCall(tag["name"], _arguments(arguments))
        at = _after(r"\s*(?:</function>)?\s*", body, at)


def _from_json(body: str) -> Iterator[ToolCall]:
    """Objects one after another, with `;`, commas or spaces between them, or lists of them."""
    at = 0
    while at < len(body):
        value, at = json.JSONDecoder(parse_constant=_refuse).raw_decode(body, at)
        for entry in value if isinstance(value, list) and value else [value]:
            yield _of_object(entry)
        at = _after(r"\s*[;,]?\s*", body, at)


def _of_object(entry: Any) -> ToolCall:
    if not isinstance(entry, dict) or entry.get("type", "function") != "function":
        raise ValueError
    call = entry["function"] if isinstance(entry.get("function"), dict) else entry
    if not isinstance(call.get("name"), str):
        raise ValueError
    arguments = call.get("parameters", call.get("arguments"))
    if isinstance(arguments, str):
        arguments = json.loads(arguments, parse_constant=_refuse)
    return ToolCall(call["name"], _arguments(arguments))


def _from_python(body: str) -> Iterator[ToolCall]:
    tree = ast.parse(body, mode="eval").body
    if not isinstance(tree, ast.List) or not tree.elts:
        raise ValueError
    for element in tree.elts:
        if not isinstance(element, ast.Call) or element.args:
            raise ValueError
        names = [keyword.arg for keyword in element.keywords]
        values = [_literal(keyword.value, 0) for keyword in element.keywords]
        if None in names or len({*names}) < len(names):  # **mapping, and a name twice
            raise ValueError
        yield ToolCall(_dotted(element.func), dict(zip(map(str, names), values, strict=True)))


def _dotted(node: ast.expr) -> str:
    """A name such as `get_weather` or `weather.get`."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    raise ValueError


def _literal(node: ast.expr, depth: int) -> Any:
    """The JSON value that a Python expression spells."""
    if depth > MOST_DEPTH:
        raise ValueError
    match node:
        case ast.Constant(value=str() | bool() | int() | None as value):
            return value
        case ast.Constant(value=float() as value) if math.isfinite(value):
            return value
        case ast.Name(id=name) if name in _NAMES:
            return _NAMES[name]
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=ast.Constant(value=int() | float() as value)):
            if isinstance(value, bool) or not math.isfinite(value):
                raise ValueError
            return -value if isinstance(sign, ast.USub) else value
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            return [_literal(element, depth + 1) for element in elements]
        case ast.Dict(keys=keys, values=values):
            names = [key.value if isinstance(key, ast.Constant) else None for key in keys]
            if not all(isinstance(name, str) for name in names):
                raise ValueError
            return {str(name): _literal(value, depth + 1) for name, value in zip(names, values, strict=True)}
    raise ValueError


def _arguments(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError
    _check_depth(value, 0)
    return value


def _check_depth(value: Any, depth: int) -> None:
    if depth > MOST_DEPTH or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_depth(inner, depth + 1)


def _refuse(constant: str) -> None:
    raise ValueError(constant)  # NaN and Infinity are no JSON


def _after(pattern: str, body: str, at: int) -> int:
    """Where what `pattern` matches ends; it may match nothing."""
    match = re.compile(pattern).match(body, at)
    return match.end() if match else at
