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


# --- which template


def folder_with(tmp_path, **files):
    folder = tmp_path / "t"
    write_tokenizer(folder)
    (folder / "chat_template.jinja").unlink()
    for name, content in files.items():
        path = folder / {"jinja": "chat_template.jinja", "legacy": "chat_template.json"}.get(name, f"{name}.json")
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def said_by(folder):
    processor = Processor(folder, ModelSpec.parse(model_entry()))
    return text_of(processor, processor.encode("a"))


def transformers_choice(folder):
    """What transformers' own processor and tokenizer take, in this order."""
    utils = pytest.importorskip("transformers.processing_utils", reason="needs transformers")
    chosen = utils.ProcessorMixin.get_processor_dict(str(folder))[0].get("chat_template")
    return chosen["default"] if isinstance(chosen, dict) else chosen


ALL = {"jinja": "JINJA", "legacy": {"chat_template": "LEGACY"}}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"legacy": {"chat_template": "LEGACY"}}, "LEGACY"),
        ({"jinja": "JINJA"}, "JINJA"),
        (ALL, "LEGACY"),
        ({**ALL, "processor_config": {"chat_template": "PROCESSOR"}}, "PROCESSOR"),
        ({"jinja": "JINJA", "tokenizer_config": {"chat_template": "TOKENIZER"}}, "JINJA"),
    ],
)
def test_the_template_is_the_one_that_transformers_takes(tmp_path, files, expected):
    folder = folder_with(tmp_path, **files)
    assert said_by(folder) == transformers_choice(folder) == expected


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
