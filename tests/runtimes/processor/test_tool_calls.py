"""Calls of tools in answers, in every form that Llama 4 writes them, beside Meta's own reading; strangers' text too."""

import json
import random
import re
import time
import types
from pathlib import Path

import pytest

import arriero
from arriero import ToolCall, parse_tool_calls

WEATHER = ToolCall("get_weather", {"city": "Lima", "days": 3})
FORMS = {
    "python": '[get_weather(city="Lima", days=3)]',
    "json": '{"type": "function", "name": "get_weather", "parameters": {"city": "Lima", "days": 3}}',
    "json_arguments": '{"name": "get_weather", "arguments": {"city": "Lima", "days": 3}}',
    "json_text": '{"name": "get_weather", "arguments": "{\\"city\\": \\"Lima\\", \\"days\\": 3}"}',
    "openai": '{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Lima", "days": 3}}}',
    "tag": '<function=get_weather>{"city": "Lima", "days": 3}</function>',
    "open_tag": '<function=get_weather>{"city": "Lima", "days": 3}',
}
AROUND = ["{}", "<|python_start|>{}<|python_end|>", "<|python_start|>{}", " {}\n", "{}<|eot|>", "{}<|eom|>",
          "<|header_start|>assistant<|header_end|>\n\n<|python_start|>{}<|python_end|><|eom|>"]  # fmt: skip


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_a_call_is_read_in_every_form_and_whatever_stands_around_it(form, around):
    assert parse_tool_calls(around.replace("{}", form)) == [WEATHER]


def test_a_call_of_a_tool_that_metas_models_know_has_a_query():
    assert parse_tool_calls('brave_search.call(query="a b")') == [ToolCall("brave_search", {"query": "a b"})]


G = '"name": "g.h", "parameters": {"a": [-2.5, [3]], "b": {"k": null, "l": true}}'


@pytest.mark.parametrize(
    "text",
    [
        "[f(), g.h(a=[-2.5, (3,)], b={'k': None, \"l\": true})]",
        '{"name": "f", "parameters": {}}; {' + G + "}",
        '{"name": "f", "parameters": {}}{' + G + "}",
        '{"name": "f", "parameters": {}}\n{' + G + "}",
        '[{"name": "f", "parameters": {}}, {' + G + "}]",
        '<function=f>{}</function><function=g.h>{"a": [-2.5, [3]], "b": {"k": null, "l": true}}</function>',
    ],
)
def test_several_calls_keep_their_order(text):
    arguments = {"a": [-2.5, [3]], "b": {"k": None, "l": True}}
    assert parse_tool_calls(text) == [ToolCall("f", {}), ToolCall("g.h", arguments)]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Just words.",
        'Here it is: [f(a="x")]',
        '[f(a="x")] is what I would call',
        "[]",
        "[f(1)]",
        "[f(a=1), 42]",
        "[[f(a=1)]]",
        "f(a=1)",
        "[f(a=1",
        "[f(**{'a': 1})]",
        "[f(a=1, a=2)]",
        "[f(a=g())]",
        "[f(a=__import__('os').system('ls'))]",
        "[f(a=x)]",
        "[f(a=1 + 1)]",
        "[f(a=f'{1}')]",
        "[f(a=b'x')]",
        "[f(a=1j)]",
        "[f(a=...)]",
        "[f(a={1: 2})]",
        "[f(a={**{}})]",
        "[f(a=1e999)]",
        "[f(a=-True)]",
        "[f()(a=1)]",
        "[f(a=1) for x in y]",
        '{"name": 5, "parameters": {}}',
        '{"name": "f"}',
        '{"name": "f", "parameters": [1]}',
        '{"name": "f", "parameters": {"a": NaN}}',
        '{"name": "f", "parameters": {"a": 1e999}}',
        '{"type": "object", "name": "f", "parameters": {}}',
        '{"answer": 42}',
        '{"name": "f", "parameters": {}} and more',
        "<function=f>x</function>",
        '<function=f>{"a": 1}</function> done',
        "<function=>{}",
    ],
)  # fmt: skip
def test_what_is_no_call_gives_none(text):
    assert parse_tool_calls(text) == []


@pytest.mark.parametrize(
    "text",
    [
        "[f(a=" + "[" * 90_000 + "]" * 90_000 + ")]",
        "[f(a=" + "-" * 190_000 + "1)]",
        "[f(a=" + "[" * 60 + "]" * 60 + ")]",
        "[f(a=" + "9" * 100_000 + ")]",
        '{"name": "f", "parameters": ' + '{"a": ' * 30_000 + "1" + "}" * 30_001,
        '{"name": "f", "parameters": {"a": ' + "[" * 60 + "]" * 60 + "}}",
        '{"name": "f", "parameters": {"a": ' + "9" * 100_000 + "}}",
        "[" + "f(), " * 30_000 + "f()]",
        "[f(a='" + "x" * 300_000 + "')]",
        "<function=f>{}" * 10_000,
        "[f(a=\x00)]",
        "[f(a='\udcff')]\udcff",
        "<|python_start|>" * 10_000,
        " " * 150_000 + "x",
    ],
    ids=range(14),
)
def test_answers_that_are_made_to_be_costly_give_none_at_once(text):
    started = time.process_time()
    assert parse_tool_calls(text) == []
    assert time.process_time() - started < 5


def test_a_call_goes_into_the_next_turn_as_it_is(processor):
    assert WEATHER.to_message()["function"]["arguments"] == '{"city": "Lima", "days": 3}'
    call = {"role": "assistant", "content": None, "tool_calls": [WEATHER.to_message()]}
    assert processor.encode([{"role": "user", "content": "a"}, call]).input_ids.size


class Scripted:
    """A session whose model asks for a tool, and then answers."""

    def __init__(self, processor):
        self.processor, self.texts, self.prompts = processor, ["[get_weather(city='Lima')]", "It is 19 degrees."], []

    def generate(self, messages, tools, max_tokens):
        self.prompts.append(self.processor.decode(self.processor.encode(messages, tools=tools).input_ids))
        return types.SimpleNamespace(text=self.texts[len(self.prompts) - 1])


def test_the_example_of_the_docs_gives_the_tools_answer_to_the_model(meta_processor):
    page = (Path(__file__).parents[3] / "docs" / "prompts.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    session = Scripted(meta_processor)
    names = {"arriero": arriero, "session": session, "get_weather": lambda city: f"19 degrees in {city}"}
    exec(compile(code, "prompts.md", "exec"), names)
    assert names["answer"].text == "It is 19 degrees."
    first, second = session.prompts
    assert "The weather of a city." in first
    call = '{"type": "function", "name": "get_weather", "parameters": {"city": "Lima"}}'
    assert f"assistant\n\n{call}ipython\n\n19 degrees in Lima" in second


# --- beside Meta's own


@pytest.fixture(scope="module")
def utils():
    return pytest.importorskip("llama_models.llama3.tool_utils", reason="needs llama-models")


def test_metas_own_cases_are_read_as_its_tests_say(utils):
    """What llama-models' tests give its own functions, taken from those tests as they run."""
    cases = pytest.importorskip("llama_models.llama3.tests.api.test_tool_utils", reason="needs llama-models")
    seen = []

    def noting(name):
        def call(text):
            seen.append((name, text, getattr(utils, name)(text)))
            return seen[-1][2]

        return call

    class Custom:
        @staticmethod
        def maybe_extract_custom_tool_call(text):
            seen.append(("first", text, utils.ToolUtils.maybe_extract_custom_tool_call(text)))
            return seen[-1][2]

    there = {"is_valid_python_list": noting("is_valid_python_list"), "ToolUtils": Custom}
    there["parse_python_list_for_function_calls"] = noting("parse_python_list_for_function_calls")
    for suite in (cases.TestToolUtils, cases.TestPythonListCheck, cases.TestParsePythonList):
        for name, method in vars(suite).items():
            if name.startswith("test_"):
                types.FunctionType(method.__code__, there, name)(suite(name))
    assert len(seen) == 20
    for name, text, expected in seen:
        ours = [(call.name, call.arguments) for call in parse_tool_calls(text)]
        if name == "is_valid_python_list":
            assert bool(ours) is expected, text
        else:
            assert (ours[0] if name == "first" else ours) == expected, text


CHAT_CASES = [
    '[get_weather(location="San Francisco", units="metric")]',
    '[complex_function(title="My Title", numbers=[1, 2, 3], enabled=True, score=3.14)]',
    'brave_search.call(query="weather in San Francisco")',
    "Just a regular response with no tool calls.",
    '<|python_start|>[f(a=1)]<|python_end|><|eom|>',
    '{"type": "function", "name": "f", "parameters": {"a": [1, null], "b": {"c": "é"}}}<|eom|>',
]  # fmt: skip


@pytest.mark.parametrize("text", CHAT_CASES)
def test_answers_are_read_as_metas_chat_format_reads_them(meta, text):
    from llama_models.datatypes import StopReason

    message = meta.decode_assistant_message_from_content(text, StopReason.end_of_turn)
    expected = [(getattr(call.tool_name, "value", call.tool_name), call.arguments_json) for call in message.tool_calls]
    assert [(call.name, json.dumps(call.arguments)) for call in parse_tool_calls(text)] == expected


def value(draw, depth=0):
    kinds = ["text", "number", "float", "bool", "none", *(["list", "dict"] if depth < 3 else [])]
    match draw.choice(kinds):
        case "text":
            return "".join(draw.choice("abc é漢😀'\\\n{}[]<|>=,;") for _ in range(draw.randrange(12)))
        case "number":
            return draw.randrange(-(10**9), 10**9)
        case "float":
            return draw.uniform(-1e3, 1e3)
        case "bool":
            return draw.random() < 0.5
        case "none":
            return None
        case "list":
            return [value(draw, depth + 1) for _ in range(draw.randrange(3))]
        case "dict":
            return {f"k{n}": value(draw, depth + 1) for n in range(draw.randrange(3))}


@pytest.mark.parametrize("form", ["json", "function_tag", "python"])
def test_random_calls_are_read_back_whole(utils, form):
    from llama_models.datatypes import ToolCall as MetaCall
    from llama_models.datatypes import ToolPromptFormat

    draw = random.Random(5)
    for _ in range(300):
        arguments = {f"a{n}": value(draw) for n in range(draw.randrange(4))}
        call = MetaCall(call_id="0", tool_name="f", arguments={})
        call.arguments = arguments
        if form == "python":
            text = f"[f({', '.join(f'{name}={each!r}' for name, each in arguments.items())})]"
            assert utils.ToolUtils.maybe_extract_custom_tool_call(text) == ("f", arguments)
        else:
            text = utils.ToolUtils.encode_tool_call(call, ToolPromptFormat(form))
        assert parse_tool_calls(text) == [ToolCall("f", arguments)], text
