"""Which of Llama 4's ways to write calls of tools a chat template has the model use."""

from __future__ import annotations

import re
from typing import Any

from arriero.errors import ArrieroError
from arriero.runtimes.processor.chat_template import ChatTemplate

_PYTHON_CALL = re.compile(r"\[\s*\w+\(\s*\w+\s*=")
_FUNCTION: dict[str, Any] = {
    "name": "probe",
    "description": "",
    "parameters": {"type": "object", "properties": {"argument": {"type": "string"}}, "required": ["argument"]},
}
_CALL: dict[str, Any] = {"id": "1", "type": "function", "function": {"name": "probe", "arguments": {"argument": "x"}}}
_MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "x"},
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "content": "x", "tool_call_id": "1"},
]


def calls_in_python(template: ChatTemplate | None) -> bool:
    """Whether `template`, in what it says of tools or in a call of before, writes one as `[name(argument=..)]`.

    Any other template, and none, has the JSON dialect.
    """
    if template is None or "tools" not in template.source.text:
        return False
    try:
        text = template.render(_MESSAGES, [{"type": "function", "function": _FUNCTION}])
    except ArrieroError:  # a template may refuse any conversation
        return False
    return _PYTHON_CALL.search(text) is not None
