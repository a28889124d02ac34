"""Messages have the roles of Llama 4 and those that the template tells apart, and no other word of its source."""

import pytest
from jinja2 import Environment

from arriero.errors import ArrieroError
from arriero.graphs.sources.llama4_defaults import default_side_files
from arriero.runtimes.processor.template_roles import ROLES, roles_of

NAMED = {
    "compared": "{% if m.role == 'judge' %}a{% endif %}",
    "compared_backwards": "{% if 'judge' != m['role'] %}a{% endif %}",
    "one_of_several": "{% if m.role in ['judge', 'user'] %}a{% endif %}",
    "one_of_a_tuple": "{% if m['role'] not in ('user', 'judge') %}a{% endif %}",
    "in_a_variable": "{% set known = ['judge'] %}{% if m.role in known %}a{% endif %}",
    "by_a_variable": "{% set kind = m.role %}{% if kind == 'judge' %}a{% endif %}",
    "in_a_macro": "{% macro head(role) %}{% if role == 'judge' %}a{% endif %}{% endmacro %}{{ head(m.role) }}",
    "in_other_letters": "{% if m.role | lower == 'judge' or m.role.strip() == 'judge' %}a{% endif %}",
    "by_get": "{% if m.get('role') == 'judge' %}a{% endif %}",
    "looked_up": "{{ {'judge': '<|judge|>'}[m.role] }}",
    "looked_up_by_get": "{% set names = {'judge': 'j'} %}{{ names.get(m.role, m.role) }}",
    "tested": "{% if m.role is eq('judge') %}a{% endif %}",
    "selected": "{% for m in messages | selectattr('role', 'equalto', 'judge') %}a{% endfor %}",
}


@pytest.mark.parametrize("source", NAMED.values(), ids=NAMED.keys())
def test_a_role_that_the_template_names_is_known(source):
    assert roles_of(Environment().parse(source)) == {*ROLES, "judge"}


OTHERS = (
    "{% if m.type == 'text' or m['content'] is string %}{{ m['content'] + '<|eot|>' }}{% endif %}",
    "{# 'judge' #}{{ 'judge' }}{% if x == 'judge' %}{{ m.role }}{% endif %}",
    "{% if m.role == '<|eot|>' or m.role in ['', 'two words'] %}a{% endif %}",
    "{{ {'user': 'judge'}[m.role] }}",
    "{% set a = [a] %}{% if m.role in a %}b{% endif %}",
)


@pytest.mark.parametrize("source", OTHERS)
def test_other_words_are_no_roles(source):
    assert roles_of(Environment().parse(source)) == {*ROLES}


def test_words_of_the_released_templates_are_no_roles(processor):
    llama4 = pytest.importorskip("transformers.models.llama4.processing_llama4", reason="needs transformers")
    for source in (llama4.chat_template, default_side_files(None)["chat_template.jinja"]):
        assert roles_of(Environment().parse(source)) == {*ROLES}
    for role in ("content", "type", "text", "image", "role", "<|eot|>", "assistant<|header_end|>", "", ["user"]):
        with pytest.raises(ArrieroError, match=r"messages\[0\].role: there is no role"):
            processor.encode([{"role": role, "content": "a"}])
