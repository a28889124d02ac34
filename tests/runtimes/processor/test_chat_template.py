import json
import time

import pytest

from arriero.errors import ArrieroError
from arriero.runtimes.backend import ModelSpec
from arriero.runtimes.processor.chat_template import ChatTemplate, TemplateSource
from arriero.runtimes.processor.processor import Processor
from tests.runtimes.conftest import model_entry, write_tokenizer
from tests.runtimes.processor.test_processor import text_of

HERE = "here"
CHAT = [
    {"role": "system", "content": " be brief "},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is 'this'?\n"}]},
    {"role": "assistant", "content": "a <cat>"},
    {"role": "tool", "content": {"näme": [1, "<b>"]}},
    {"role": "user", "content": "sure?"},
]


def render(template, messages=({"role": "user", "content": "x"},)):
    return ChatTemplate(TemplateSource(template, HERE), {"bos_token": "<|begin_of_text|>"}).render(messages)


def render_as_transformers(template, messages):
    tools = pytest.importorskip("transformers.utils.chat_template_utils", reason="needs transformers")
    (text,), _ = tools.render_jinja_template(
        [messages], chat_template=template, add_generation_prompt=True, bos_token="<|begin_of_text|>"
    )
    return text


def test_the_template_has_its_helpers_and_its_walls():
    assert render("{{ {'a<b': 'é'} | tojson }}") == '{"a<b": "é"}'
    assert len(render("{{ strftime_now('%Y') }}")) == 4
    loop = "{% for i in [1, 2] %}\n  {% if i == 2 %}\n{% break %}\n  {% endif %}\n{{ i }}\n{% endfor %}"
    assert render(loop) == "1\n"
    with pytest.raises(ArrieroError, match=r"refuses these messages.*roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")
    for escape in (
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% set ns = namespace(a=1) %}{% set ns.__class__ = 1 %}",
    ):
        with pytest.raises(ArrieroError, match="refuses these messages"):
            render(escape)


TEMPLATES = {
    "loop": "{% for m in messages %}{{ loop.index0 }}{{ loop.last }}{{ loop.length }}{% else %}-{% endfor %}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}[{{ m.role }}]{% endif %}{% endfor %}",
    "generation_scope": "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "no_tools": "{{ tools is defined }}{{ tools is none }}{{ documents is none }}{{ nothing is defined }}",
    "macro": "{% macro q(x) %}<{{ x }}>{% endmacro %}{% for m in messages %}{{ q(m.role) }}{% endfor %}",
    "recursive": "{% for x in [[1, [2]], [3]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "filters": "{{ messages[1:] | map(attribute='role') | join(', ') | upper | trim }}{{ 'a%sb' % 3 }}{{ 'x' ~ 1 }}",
    "literals": "{{ [1, (2, 'a')] }}{{ {'k': [1]} }}{{ 3 * 2 ** 3 }}{{ 'ab' * 2 }}{{ [1] + [2] }}",
    "json": "{{ messages[3].content | tojson(indent=2) }}{{ 'é' | tojson(ensure_ascii=True, separators=(',', ':')) }}",
    "set_block": "{% set t %}a{{ messages[4].content }}{% endset %}{{ t | replace('s', 'z') }}{{ 'a b'.split()[1] }}",
    "filter_block": "{% filter upper %}a{{ messages[0].role }}{% endfilter %}",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_the_bounds_leave_every_construct_as_transformers_renders_it(template):
    assert render(template, CHAT) == render_as_transformers(template, CHAT)


def test_llama4s_own_template_renders_as_in_transformers():
    llama4 = pytest.importorskip("transformers.models.llama4.processing_llama4", reason="needs transformers")
    assert render(llama4.chat_template, CHAT) == render_as_transformers(llama4.chat_template, CHAT)


def test_reasoning_and_nulls_of_a_message_reach_the_template_as_in_transformers():
    template = "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}|{{ 'tool_calls' in m }};{% endfor %}"
    chat = [{"role": "assistant", "content": "a", "reasoning": "why"}]
    assert render(template, chat) == render_as_transformers(template, chat) == "why|why|False;"
    assert render(template, [{"role": "assistant", "content": "a", "tool_calls": None}]) == "||False;"


GREEDY = {
    "nested_loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% set x = a %}{% endfor %}{% endfor %}",
    "output": "{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxxxxxxxxxxxxxxx{% endfor %}{% endfor %}",
    "power": "{{ 10 ** (10 ** 8) }}",
    "squares": "{% set ns = namespace(x=9) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "text_times": "{{ 'x' * 10 ** 9 }}",
    "list_times": "{{ ([0] * 10 ** 9) | length }}",
    "doubled_text": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubled_sum": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubled_list": "{% set x = [1] %}" + "{% set x = [x, x] %}" * 60 + "{{ x }}",
    "doubled_blocks": "{% set x = 'ab' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60,
    "center": "{{ 'x' | center(10 ** 9) }}",
    "method": "{{ 'x'.ljust(10 ** 9) }}",
    "format": "{{ '{:>999999999}'.format('x') }}",
    "percent": "{{ '%999999999d' % 3 }}",
    "replace": "{{ ('x' * 9999) | replace('x', 'y' * 9999) | length }}",
    "join": "{{ ('x' * 9999).join('y' * 9999) | length }}",
    "macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "endless_recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "from_nothing": "{{ lipsum(n=10 ** 6) }}",
    "filter_map": "{% set x = range(99999) | map('center', 9999) | list %}",
}


@pytest.mark.parametrize("template", GREEDY.values(), ids=GREEDY.keys())
def test_a_template_that_loops_or_grows_is_ended(template, monkeypatch):
    monkeypatch.setattr("arriero.runtimes.processor.bounded_jinja.SECONDS", 1.0)
    started = time.process_time()
    with pytest.raises(ArrieroError, match="refuses these messages"):
        render(template)
    assert time.process_time() - started < 30  # they would take hours, or all memory


@pytest.mark.parametrize("template", ["{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{% if a %}" * 500, "x" * 10**7])
def test_a_template_that_cannot_be_compiled_is_refused(template):
    with pytest.raises(ArrieroError, match="here: the chat template"):
        render(template)


def test_a_long_conversation_has_budget_enough():
    llama4 = pytest.importorskip("transformers.models.llama4.processing_llama4", reason="needs transformers")
    chat = [{"role": role, "content": "word <b> " * 20_000} for _ in range(20) for role in ("user", "assistant")]
    assert render(llama4.chat_template, chat).count("word") == 800_000


# --- what else a template may show


def render_with_transformers(template, chat, **options):
    tools = pytest.importorskip("transformers.utils.chat_template_utils", reason="needs transformers")
    asked = not options.get("continue_final_message", False)
    named = {"chat_template": template, "add_generation_prompt": asked, "bos_token": "<|begin_of_text|>"}
    (text,), _ = tools.render_jinja_template([chat], **named, **options)
    return text


CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": ["é", None], "b": {}}}}
CALLING = [
    {"role": "user", "content": "x"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "y"},
]
SHOWING = """{% for t in tools or [] %}{{ t | tojson }}{% endfor %}
{%- for d in documents or [] %}{{ d.title }}:{{ d.text }}{% endfor %}
{%- for m in messages %}<|header_start|>{{ m.role }}<|header_end|>{{ m.content }}
{%- for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}<|eot|>
{%- endfor %}"""


def llama4_template():
    llama4 = pytest.importorskip("transformers.models.llama4.processing_llama4", reason="needs transformers")
    return llama4.chat_template


def test_tools_calls_and_documents_are_shown_as_in_transformers(tmp_path):
    documents = [{"title": "a", "text": "b < c"}]
    expected = render_with_transformers(SHOWING, CALLING, tools=TOOLS, documents=documents)
    assert said_by(folder_with(tmp_path, jinja=SHOWING), CALLING, tools=TOOLS, documents=documents) == expected


def test_llama4s_own_template_shows_tools_and_calls_as_in_transformers(tmp_path):
    folder, template = folder_with(tmp_path, jinja=llama4_template()), llama4_template()
    assert said_by(folder, CALLING, tools=TOOLS) == render_with_transformers(template, CALLING, tools=TOOLS)


def test_messages_of_openais_api_are_those_with_mappings(tmp_path):
    """There a call's arguments are JSON text, and its content is null or left out."""
    folder = folder_with(tmp_path, jinja=SHOWING)
    spelled = {**CALL, "id": "1", "function": {"name": "f", "arguments": json.dumps(CALL["function"]["arguments"])}}
    for content in ({"content": None}, {}, {"content": ""}):
        chat = [CALLING[0], {"role": "assistant", **content, "tool_calls": [spelled]}, CALLING[2]]
        assert said_by(folder, chat) == said_by(folder, CALLING)
    for arguments in ("", None):
        none = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        chat = [CALLING[0], {"role": "assistant", "content": "", "tool_calls": [none]}]
        assert "f{}<|eot|>" in said_by(folder, chat)


def call_of(function):
    return [{"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}]


@pytest.mark.parametrize(
    ("chat", "sentence"),
    [
        (call_of({"name": "f", "arguments": "{"}), r"messages\[0\].tool_calls\[0\].function.arguments:1: is not valid"),
        (call_of({"name": "f", "arguments": "[1]"}), r"the arguments are a list; expected a JSON object, or its text"),
        (call_of({"name": "f", "arguments": 5}), r"function.arguments: the arguments are a int"),
        (call_of({"arguments": "{}"}), r"tool_calls\[0\].function: the call is malformed"),
        (call_of("f"), r"the call is malformed"),
        (call_of({"name": "f", "arguments": '{"a": ' * 200 + "1" + "}" * 200}), "nested too deeply"),
        (
            [{"role": "assistant", "content": None, "tool_calls": "f"}],
            r"messages\[0\].tool_calls: is 'f'",
        ),
        ([{"role": "assistant", "content": None, "tool_calls": []}], "the content is malformed"),
    ],
)
def test_calls_that_cannot_be_shown_are_refused(tmp_path, chat, sentence):
    with pytest.raises(ArrieroError, match=sentence):
        said_by(folder_with(tmp_path, jinja=SHOWING), chat)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tools": "f"}, "tools is a str; expected a list of mappings"),
        ({"tools": [print]}, r"tools\[0\]: is a builtin_function_or_method; expected a function's JSON schema"),
        ({"documents": ["a"]}, r"documents\[0\]: is a str; expected a mapping with title and text"),
        ({"documents": {"title": "a"}}, "documents is a dict"),
    ],
)
def test_tools_and_documents_of_other_kinds_are_refused(tmp_path, options, sentence):
    with pytest.raises(ArrieroError, match=sentence):
        said_by(folder_with(tmp_path, jinja=SHOWING), **options)


def test_a_template_that_shows_no_tools_is_named(tmp_path):
    folder = folder_with(tmp_path, jinja="{{ messages[0].content }}")
    for name in ("tools", "documents"):
        with pytest.raises(ArrieroError, match=f"jinja: the chat template takes no {name}.*Leave {name}"):
            said_by(folder, **{name: TOOLS})


# --- an answer that goes on with the last message

TRIMMING = "{% for m in messages %}<|header_start|>{{ m.content | trim }}<|eot|>{% endfor %}"
LISTS = """{% for m in messages %}<|header_start|>{% if m.content is string %}{{ m.content }}{% else %}
{%- for e in m.content %}{{ e.text }}{% endfor %}{% endif %}<|eot|>{% endfor %}"""


@pytest.mark.parametrize("template", [SHOWING, TRIMMING, LISTS], ids=["showing", "trimming", "lists"])
@pytest.mark.parametrize("content", ["1, 2,", " 1, 2, ", "ends in <", "", " ", "~^`@$", "twice 1, 2, 1, 2,"])
def test_the_last_message_is_continued_as_in_transformers(tmp_path, template, content):
    chat = [{"role": "user", "content": "1, 2,"}, {"role": "assistant", "content": content}]
    expected = render_with_transformers(template, chat, continue_final_message=True)
    assert said_by(folder_with(tmp_path, jinja=template), chat, continue_final_message=True) == expected


def test_the_last_text_of_a_list_is_continued_as_in_transformers(tmp_path):
    entries = [{"type": "text", "text": "a"}, {"type": "text", "text": "b "}]
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": entries}]
    ours = said_by(folder_with(tmp_path, jinja=LISTS), chat, continue_final_message=True)
    assert ours == render_with_transformers(LISTS, chat, continue_final_message=True)
    assert ours.endswith("ab ")


def test_a_continued_message_that_spells_a_control_token_spells_it(tmp_path):
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "a<|eot|>b"}]
    processor = Processor(folder_with(tmp_path, jinja=LISTS), ModelSpec.parse(model_entry()))
    ids = processor.encode(chat, continue_final_message=True).input_ids
    assert ids[ids >= 256].tolist() == [258, 257, 258]


HIDING = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "chat", "sentence"),
    [
        (HIDING, [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "does not show the last"),
        ("{{ messages[-1].content[:1] }}", [{"role": "assistant", "content": "yes"}], "does not show the last message"),
        (LISTS, call_of({"name": "f", "arguments": {}}), r"messages\[0\].content: the last message has no text"),
        (LISTS, [{"role": "assistant", "content": []}], "has no text to go on with"),
        (LISTS, "x", "continue_final_message is set, and the prompt is a text"),
    ],
)
def test_a_message_that_cannot_be_continued_is_refused(tmp_path, template, chat, sentence):
    with pytest.raises(ArrieroError, match=sentence):
        said_by(folder_with(tmp_path, jinja=template), chat, continue_final_message=True)


# --- which template


def folder_with(tmp_path, **files):
    folder = tmp_path / "t"
    write_tokenizer(folder)
    (folder / "chat_template.jinja").unlink()
    for name, content in files.items():
        path = folder / {"jinja": "chat_template.jinja", "legacy": "chat_template.json"}.get(name, f"{name}.json")
        if name.startswith("more/"):
            path = folder / "additional_chat_templates" / f"{name.removeprefix('more/')}.jinja"
            path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def said_by(folder, chat="a", **options):
    processor = Processor(folder, ModelSpec.parse(model_entry()))
    return text_of(processor, processor.encode(chat, **options))


def transformers_choice(folder, tools=None):
    """What transformers' own processor takes, or where it finds none, its tokenizer."""
    utils = pytest.importorskip("transformers.processing_utils", reason="needs transformers")
    from transformers import PreTrainedTokenizerFast

    chosen = utils.ProcessorMixin.get_processor_dict(str(folder))[0].get("chat_template")
    if chosen is None or tools is not None:
        return PreTrainedTokenizerFast.from_pretrained(str(folder)).get_chat_template(tools=tools)
    return chosen["default"] if isinstance(chosen, dict) else chosen


ALL = {"jinja": "JINJA", "legacy": {"chat_template": "LEGACY"}}
LISTED = [{"name": "tool_use", "template": "LISTED {{ tools }}"}, {"name": "default", "template": "PLAIN"}]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"legacy": {"chat_template": "LEGACY"}}, "LEGACY"),
        ({"jinja": "JINJA"}, "JINJA"),
        (ALL, "LEGACY"),
        ({**ALL, "processor_config": {"chat_template": "PROCESSOR"}}, "PROCESSOR"),
        ({"jinja": "JINJA", "tokenizer_config": {"chat_template": "TOKENIZER"}}, "JINJA"),
        ({"legacy": {"chat_template": "LEGACY"}, "tokenizer_config": {"chat_template": "TOKENIZER"}}, "LEGACY"),
        ({"processor_config": {}, "tokenizer_config": {"chat_template": "TOKENIZER"}}, "TOKENIZER"),
        ({"tokenizer_config": {"chat_template": LISTED}}, "PLAIN"),
        ({"jinja": "JINJA", "more/default": "MORE"}, "JINJA"),
        ({"more/default": "MORE", "more/rag": "RAG"}, "MORE"),
        ({"more/default": "MORE", "tokenizer_config": {"chat_template": "TOKENIZER"}}, "MORE"),
    ],
)
def test_the_template_is_the_one_that_transformers_takes(tmp_path, files, expected):
    folder = folder_with(tmp_path, **files)
    assert said_by(folder) == transformers_choice(folder) == expected


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"chat_template": LISTED}},
        {"jinja": "JINJA", "more/tool_use": "LISTED {{ tools }}"},
        {"jinja": "LISTED {{ tools }}"},
        {"jinja": "LISTED {{ tools }}", "more/rag": "RAG"},
    ],
)
def test_tools_have_the_template_for_them_as_in_transformers(tmp_path, files):
    folder = folder_with(tmp_path, **files)
    assert transformers_choice(folder, TOOLS) == "LISTED {{ tools }}"
    assert said_by(folder, tools=TOOLS).startswith("LISTED [{")


def test_templates_with_names_are_read_by_default(tmp_path):
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "YES"}]
    assert said_by(folder_with(tmp_path, tokenizer_config={"chat_template": named})) == "YES"
    others = tmp_path / "t" / "additional_chat_templates"
    others.mkdir()
    (others / "default.jinja").write_text("OTHER")
    assert said_by(tmp_path / "t") == "OTHER"


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"legacy": {"other": 1}}, r"chat_template.json: holds no chat_template"),
        ({"legacy": {"chat_template": 5}}, r"chat_template.json:chat_template: is a int"),
        ({"tokenizer_config": {"chat_template": [{"name": "rag", "template": "x"}]}}, "no template called default"),
        ({"legacy": "[" * 100_000}, "nested too deeply"),
    ],
)
def test_templates_that_cannot_be_taken_are_refused(tmp_path, files, sentence):
    with pytest.raises(ArrieroError, match=sentence):
        said_by(folder_with(tmp_path, **files))


def test_the_old_file_beside_a_folder_of_templates_is_refused_as_in_transformers(tmp_path):
    folder = folder_with(tmp_path, legacy={"chat_template": "x"})
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("y")
    with pytest.raises(ArrieroError, match="exclude each other"):
        said_by(folder)
