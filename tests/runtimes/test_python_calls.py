"""Forced calls in Python's dialect: whatever their grammar lets through is read as a call that the schema allows."""

from __future__ import annotations

import random
from typing import Any

import jsonschema
import numpy as np
import pytest

from arriero.errors import ArrieroError
from arriero.runtimes.forced_calls import ForcedCalls
from arriero.runtimes.grammar import Form
from arriero.runtimes.processor.call_dialect import calls_in_python
from arriero.runtimes.processor.chat_template import ChatTemplate, TemplateSource
from arriero.runtimes.processor.tool_calls import parse_tool_calls
from arriero.runtimes.python_calls import python_grammar

llguidance = pytest.importorskip("llguidance", reason="needs llguidance: pip install 'arriero[structured]'")

SCHEMAS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "simple": {
        "type": "object",
        "properties": {
            "text": {"type": "string", "description": "any"},
            "count": {"type": "integer"},
            "share": {"type": "number"},
            "on": {"type": "boolean"},
            "none": {"type": "null"},
        },
        "required": ["text", "on"],
    },
    "bounded": {
        "type": "object",
        "properties": {
            "text": {"type": "string", "minLength": 2, "maxLength": 4},
            "count": {"type": "integer", "minimum": -3, "exclusiveMaximum": 12},
            "share": {"type": "number", "minimum": 0, "maximum": 1},
            "day": {"type": "string", "format": "date"},
            "code": {"type": "string", "pattern": r"^[a-c]\\\"\d{2}$"},
        },
        "required": ["text", "count", "share", "day", "code"],
    },
    "choices": {
        "type": "object",
        "properties": {
            "enum": {"enum": ["a\"b'c\\", "é😀\n\u0001", 1, 1.5, True, False, None, [1, {"x": None}]]},
            "typed": {"type": ["integer", "boolean"], "enum": ["a", 2, True, 3.0]},
            "const": {"const": {"a": [True, None]}},
            "any_of": {"anyOf": [{"type": "boolean"}, {"type": "null"}, {"type": "string", "maxLength": 2}]},
            "types": {"type": ["boolean", "null", "integer"]},
        },
        "required": ["enum", "typed", "const", "any_of", "types"],
    },
    "nested": {
        "type": "object",
        "properties": {
            "list": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
            "empty": {"type": "array", "maxItems": 0},
            "free_list": {"type": "array"},
            "dict": {
                "type": "object",
                "properties": {"no name": {"type": "boolean"}, 'b\\"': {"type": "array", "items": {"type": "null"}}},
                "required": ["no name"],
            },
            "by_name": {"type": "object", "additionalProperties": {"type": "boolean"}},
            "closed": {"type": "object", "additionalProperties": False},
            "anything": {},
        },
        "required": ["list", "empty", "dict", "by_name", "closed", "anything"],
    },
    "references": {
        "type": "object",
        "properties": {"tree": {"$ref": "#/$defs/tree"}, "leaf": {"$ref": "#/properties/tree"}},
        "required": ["tree"],
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {
                    "on": {"type": "boolean"},
                    "below": {"type": "array", "items": {"$ref": "#/$defs/tree"}},
                },
                "required": ["on"],
            }
        },
    },
    "spelled as JSON": {
        "type": "object",
        "properties": {
            "odd": {"type": "object", "patternProperties": {"^a+$": {"type": "boolean"}}, "additionalProperties": False}
        },
        "required": ["odd"],
    },
}
CLOSING = b'"]})'


def tokenizer() -> Any:
    return llguidance.LLTokenizer("byte")


def write(form: Form, seed: int, python: bool = True) -> str:
    """A text that the grammar of `form` lets through: drawn byte by byte, towards its end after a while."""
    bytes_only = tokenizer()
    matcher = llguidance.LLMatcher(bytes_only, form.source(llguidance.LLMatcher, python), log_level=0)
    draw, said = random.Random(seed), bytearray()
    while not matcher.is_accepting():
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        allowed = [token for token in np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist() if token < 256]
        closing = [token for token in allowed if token in CLOSING]
        token = draw.choice(closing if closing and draw.random() < len(said) / 300 else allowed)
        assert matcher.consume_token(token), (said, matcher.get_error())
        said.append(token)
    return said.decode()


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("most", [1, 3])
def test_whatever_the_grammar_lets_through_is_a_valid_call(name: str, most: int) -> None:
    functions = [{"name": "f", "parameters": SCHEMAS[name]}, {"name": "tools.g"}]
    called = set()
    for seed in range(25):
        text = write(Form(calls=ForcedCalls(functions, most)), seed)
        assert (text[0], text[-2:]) == ("[", ")]")
        calls = parse_tool_calls(text)
        assert 1 <= len(calls) <= most, text
        for call in calls:
            called.add(call.name)
            schema = SCHEMAS[name] if call.name == "f" else {"type": "object", "maxProperties": 0}
            jsonschema.validate(call.arguments, schema, format_checker=jsonschema.FormatChecker())
    assert called == {"f", "tools.g"}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("simple", 'text="it\'s \\"so\\" é😀\\n\\\\", count=-12, share=1.5e-7, on=True, none=None'),
        ("simple", 'text="", on=False'),
        ("simple", 'text="", share=0, on=False'),
        ("choices", 'enum=False, typed=True, const={"a": [True, None]}, any_of=None, types=7'),
        ("nested", 'list=[True, False], empty=[], dict={"no name": True, "b\\\\\\"": [None]}, by_name={"x": True}, '
         'closed={}, anything=[1, {"a": None}, [[]]]'),
        ("references", 'tree={"on": True, "below": [{"on": False}]}'),
    ],
)  # fmt: skip
def test_calls_as_a_model_writes_them_are_let_through(name: str, arguments: str) -> None:
    form = Form(calls=ForcedCalls([{"name": "f", "parameters": SCHEMAS[name]}]))
    bytes_only = tokenizer()
    matcher = llguidance.LLMatcher(bytes_only, form.source(llguidance.LLMatcher, True), log_level=0)
    text = f"[f({arguments})]"
    assert matcher.consume_tokens(list(text.encode())), matcher.get_error()
    assert matcher.is_accepting()
    assert len(parse_tool_calls(text)) == 1


@pytest.mark.parametrize(
    "function",
    [
        {"name": "get-weather"},
        {"name": "class"},
        {"name": "f", "parameters": {"type": "object", "properties": {"from": {"type": "string"}}}},
        {"name": "f", "parameters": {"type": "object", "properties": {}, "required": ["a"]}},
        {"name": "f", "parameters": {"anyOf": [{"type": "object"}]}},
        {"name": "f", "parameters": {"properties": {"a": {"allOf": [{"$ref": "#/$defs/b"}]}}, "$defs": {"b": {}}}},
    ],
)
def test_what_python_cannot_say_is_called_in_json(function: dict[str, Any]) -> None:
    calls = ForcedCalls([function])
    assert python_grammar(calls) is None
    assert Form(calls=calls).source(llguidance.LLMatcher, True) == Form(calls=calls).source(llguidance.LLMatcher, False)


def test_both_dialects_have_the_same_limits() -> None:
    many = {"type": "object", "properties": {f"a{n}": {"type": "integer"} for n in range(1001)}}
    for python in (True, False):
        with pytest.raises(ArrieroError, match="json_schema has 1,001 properties of one object"):
            Form(calls=ForcedCalls([{"name": "f", "parameters": many}])).source(llguidance.LLMatcher, python)
    for wrong in ([], [{}], [3]):
        with pytest.raises(ArrieroError, match=r"calls has the functions .*; expected mappings with name"):
            ForcedCalls(wrong)  # type: ignore[arg-type]
    with pytest.raises(ArrieroError, match="calls is 3; expected a `ForcedCalls`"):
        Form(calls=3)  # type: ignore[arg-type]


HISTORY = """{% for m in messages %}{{ m.content }}{% for call in m.tool_calls or [] %}{% set f = call.function %}
[{{ f.name }}({% for name in f.arguments %}{{ name }}={{ f.arguments[name] | tojson }}{% endfor %})]
{% endfor %}{% endfor %}{{ tools }}"""


@pytest.mark.parametrize(
    ("template", "python"),
    [
        (HISTORY, True),
        ("{% if tools %}Answer as [func_name1(params_name1=params_value1), func_name2(params)]{% endif %}", True),
        ('{% for tool in tools %}{{ tool | tojson }}{% endfor %}Answer as {"name": .., "parameters": ..}', False),
        ("[f(a=1)]", False),  # takes no tools
        ("{{ tools }}{{ raise_exception('no') }}[f(a=1)]", False),
    ],
)
def test_the_template_says_which_dialect_it_is(template: str, python: bool) -> None:
    assert calls_in_python(ChatTemplate(TemplateSource(template, "here"), {})) == python


def test_without_a_template_it_is_json() -> None:
    assert not calls_in_python(None)
