"""A checkpoint's chat templates: which they are, and messages rendered through one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from jinja2.visitor import NodeTransformer

from arriero.errors import ArrieroError
from arriero.runtimes.processor.bounded_jinja import BoundedEnvironment
from arriero.runtimes.processor.own_letters import Marking, OwnLetters, marker
from arriero.runtimes.processor.template_roles import roles_of
from arriero.strict_json import read_json_object

MOST_SOURCE = 1_000_000  # characters; the longest templates that models come with have some ten thousand
DEFAULT, TOOL_USE = "default", "tool_use"
USED = (DEFAULT, TOOL_USE)  # of templates that have names
ORIGINAL = "Take the chat template of the original checkpoint"
_REASONING = ("reasoning_content", "thinking", "reasoning")  # the names under which messages bring it


@dataclass(frozen=True)
class TemplateSource:
    """A template and where it stands."""

    text: str
    where: str


class ChatTemplate:
    """A compiled chat template with the special tokens it may name."""

    def __init__(
        self, source: TemplateSource, special_tokens: Mapping[str, str], rewrite: NodeTransformer | None = None
    ) -> None:
        """Compile `source`, changed by `rewrite`; `special_tokens` such as bos_token are visible in it."""
        self.source, self._special_tokens = source, dict(special_tokens)
        self._environment = BoundedEnvironment(rewrite)
        self._environment.globals["raise_exception"] = _raise
        self._marked: dict[tuple[OwnLetters, Marking], ChatTemplate] = {}
        if len(source.text) > MOST_SOURCE:
            what = f"the chat template has {len(source.text):,} characters"
            raise ArrieroError(what, where=source.where, expected=f"at most {MOST_SOURCE:,}", remedy=ORIGINAL)
        try:
            self._template = self._environment.from_string(source.text)
        except jinja2.TemplateSyntaxError as error:
            what = f"the chat template is broken at line {error.lineno} ({error.message})"
            raise ArrieroError(what, where=source.where, remedy=ORIGINAL) from None
        except (RecursionError, SyntaxError, MemoryError, OverflowError) as error:
            what = f"the chat template is nested too deeply ({error or type(error).__name__})"
            raise ArrieroError(what, where=source.where, remedy=ORIGINAL) from None

    @cached_property
    def roles(self) -> frozenset[str]:
        """The roles that messages may have: those that every Llama 4 knows, and those that the template names."""
        return roles_of(self._environment.parse(self.source.text))

    def knows_role(self, role: Any) -> bool:
        """Whether messages may be of this role."""
        return isinstance(role, str) and role in self.roles

    def marked(self, letters: OwnLetters, marking: Marking) -> ChatTemplate:
        """This template with stand-ins for `letters` in its own words; compiled when it is asked for first."""
        if (letters, marking) not in self._marked:
            tokens = {name: letters.mark_tokens(token) for name, token in self._special_tokens.items()}
            self._marked[letters, marking] = ChatTemplate(self.source, tokens, marker(letters, marking, self.roles))
        return self._marked[letters, marking]

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        token_boundary: str = "",
        now: datetime | None = None,
    ) -> str:
        """Give the prompt text for `messages`, ending where the assistant's answer begins.

        A template may write `token_boundary` where what follows is to be encoded by itself, and the time `now`.
        """
        time = now or datetime.now()
        variables = {
            **self._special_tokens,
            "messages": [_with_reasoning(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
            "tools": tools,
            "documents": documents,
            "token_boundary": token_boundary,
            "strftime_now": lambda form: time.strftime(form),
        }
        try:
            return self._environment.render(self._template, variables)
        except Exception as error:  # a template is a stranger's program: it may fail in any way
            raise ArrieroError(
                f"the chat template refuses these messages ({error or type(error).__name__})",
                where=self.source.where,
                expected="a list of {role, content} that alternates as the model was trained",
                remedy="Change the messages, or take the chat template of the original checkpoint",
            ) from None


def _with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message as Hugging Face's tools hand it to templates: no nulls, and its reasoning under every name."""
    plain = {key: value for key, value in message.items() if value is not None}
    reasoning = next((plain[key] for key in _REASONING if key in plain), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


# --- which templates a checkpoint has


def find_templates(
    folder: Path, tokenizer_config: Mapping[str, Any], processor_config: Mapping[str, Any]
) -> dict[str, TemplateSource]:
    """Give the templates by name that Hugging Face's processor or tokenizer takes of `folder`, {} where there is none.

    The one called default is there, and `tool_use` for prompts with tools if there is one. In this order:
    `chat_template` of processor_config.json, chat_template.json, chat_template.jinja with what stands beside it in the
    folder additional_chat_templates, then what tokenizer_config.json holds.
    """
    inside = processor_config.get("chat_template")
    if inside is not None:
        return _named(inside, f"{folder / 'processor_config.json'}:chat_template")
    others = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    legacy, file = folder / "chat_template.json", folder / "chat_template.jinja"
    if legacy.is_file():
        if others:
            what = "chat_template.json and the folder additional_chat_templates exclude each other"
            remedy = "Replace chat_template.json by a chat_template.jinja, or remove the folder"
            raise ArrieroError(
                what, where=str(folder), expected="one of them, as Hugging Face's tools do", remedy=remedy
            )
        content = read_json_object(legacy, ORIGINAL)
        if content.get("chat_template") is None:
            raise ArrieroError("holds no chat_template", where=str(legacy), remedy=ORIGINAL)
        return _named(content["chat_template"], f"{legacy}:chat_template")
    beside = {path.stem: path for path in others} | ({DEFAULT: file} if file.is_file() else {})
    if DEFAULT in beside:
        return {name: TemplateSource(_read(path), str(path)) for name, path in beside.items() if name in USED}
    inside = tokenizer_config.get("chat_template")
    if inside is not None:
        return _named(inside, f"{folder / 'tokenizer_config.json'}:chat_template")
    if others:
        raise ArrieroError(
            f"there are templates for special uses only: {', '.join(beside)}",
            where=str(others[0].parent),
            expected="a chat_template.jinja, the default",
            remedy="Copy the one that the model should be asked with to chat_template.jinja",
        )
    return {}


def _named(value: Any, where: str) -> dict[str, TemplateSource]:
    """A text, or those that we use of a list of {name, template} or of a mapping."""
    if isinstance(value, list) and all(isinstance(entry, Mapping) for entry in value):
        value = {entry.get("name"): entry.get("template") for entry in value}
    if not isinstance(value, Mapping):
        value = {DEFAULT: value}
    elif not isinstance(value.get(DEFAULT), str):
        names = ", ".join(map(str, value)) or "none"
        remedy = "Name the template that the model should be asked with default"
        what = f"holds no template called default ({names})"
        raise ArrieroError(what, where=where, expected="a default", remedy=remedy)
    used = {name: value[name] for name in USED if name in value}
    for text in used.values():
        if not isinstance(text, str):
            what = f"is a {type(text).__name__}"
            raise ArrieroError(what, where=where, expected="the text of a template", remedy=ORIGINAL)
    return {name: TemplateSource(text, where) for name, text in used.items()}


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        what = f"the chat template is not UTF-8 text (byte {error.start})"
        raise ArrieroError(what, where=str(file), remedy=ORIGINAL) from None
    except OSError as error:
        raise ArrieroError(f"cannot be read ({error.strerror})", where=str(file), remedy=ORIGINAL) from None
