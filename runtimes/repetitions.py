"""How large a regular expression or a grammar becomes once its counted repetitions are written out.

A matcher holds a state for each of those characters: `(a{1000}){1000}` is 15 characters and a million states.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from arriero.errors import ArrieroError

# At this size a mask over 200,000 tokens takes a tenth of a second, at a million several seconds.
MOST_EXPANDED = 1 << 15

_COUNT = r"\{(?P<least>\d+)(?:,(?P<most>\d*))?\}"
_REGEX = re.compile(
    rf"{_COUNT}|(?P<open>\((?:\?(?:P?<\w+>|[\w-]*:?))?)|(?P<close>\))"
    r"|(?P<one>\\.|\[\^?\]?(?:\\.|\[:\^?\w+:\]|[^\]\\])*\]|.)",
    re.DOTALL,
)
_LARK = re.compile(
    r"//[^\n]*|\s+"
    rf"|{_COUNT}|~\s*(?P<lark_least>\d+)(?:\s*\.\.\s*(?P<lark_most>\d+))?"
    r"|(?P<open>[(\[])|(?P<close>[)\]])"
    r'|"(?P<text>(?:\\.|[^"\\])*)"|/(?P<regex>(?:\\.|[^/\\])+)/|(?P<name>[A-Za-z_]\w*)|(?P<one>.)',
    re.DOTALL,
)
_DEFINITION = re.compile(r"^[ \t]*[?!]?(\w+)[^\n:\"/]*:", re.MULTILINE)
_INLINE_SCHEMA = re.compile(r"%json\s*(?=\{)")


def check_regex(name: str, pattern: str) -> None:
    """Refuse a regular expression of `name` that becomes larger than `MOST_EXPANDED`."""
    _check(name, regex_size(pattern))


def check_grammar(name: str, grammar: str) -> None:
    """Refuse a grammar in Lark's notation of which one definition becomes larger than `MOST_EXPANDED`."""
    _check(name, max(grammar_sizes(grammar).values(), default=0))


def inline_schemas(grammar: str) -> Iterator[Any]:
    """The JSON schemas that stand in a grammar, where they are JSON."""
    for found in _INLINE_SCHEMA.finditer(grammar):
        try:
            yield json.JSONDecoder().raw_decode(grammar, found.end())[0]
        except ValueError:
            continue  # llguidance says what is wrong with it


def regex_size(pattern: str) -> int:
    """The characters that `pattern` comes to; a class or an escape is one."""
    return _size(_REGEX, pattern, lambda _: 1)


def grammar_sizes(grammar: str) -> dict[str, int]:
    """The characters that each definition comes to.

    A terminal counts wherever it is named, since it is written out there; a rule counts one, since it is not.
    """
    starts = [*_DEFINITION.finditer(grammar)]
    ends = [*(start.start() for start in starts[1:]), len(grammar)]
    bodies = {start[1]: grammar[start.end() : end] for start, end in zip(starts, ends, strict=False)}
    sizes: dict[str, int] = {}

    def item(token: re.Match[str]) -> int:
        if (text := token["text"]) is not None:
            return len(text)
        if (regex := token["regex"]) is not None:
            return regex_size(regex)
        name = token["name"]
        return definition(name) if name is not None and name.isupper() and name in bodies else 1

    def definition(name: str) -> int:
        if name not in sizes:
            sizes[name] = 1  # of a terminal that names itself, which is refused elsewhere
            sizes[name] = _size(_LARK, bodies[name], item)
        return sizes[name]

    try:
        for name in bodies:
            definition(name)
    except RecursionError:
        raise ArrieroError("grammar names terminals within terminals too deeply", remedy="Simplify it") from None
    return sizes


def _size(tokens: re.Pattern[str], text: str, item: Callable[[re.Match[str]], int]) -> int:
    """The sum over all items, each as often as the counts behind it and behind the groups around it say."""
    groups: list[tuple[int, int]] = []
    before, last = 0, 0  # items up to the last one, and that one
    for token in tokens.finditer(text):
        named = token.groupdict()
        counts = [named.get(key) for key in ("least", "most", "lark_least", "lark_most")]
        if any(counts):
            last *= max(int(count) if len(count) < 10 else MOST_EXPANDED + 1 for count in counts if count)
        elif named["open"] is not None:
            groups.append((before, last))
            before, last = 0, 0
        elif named["close"] is not None:
            whole = before + last
            # one that closes nothing may end a group that was taken for something else: all before is repeated then
            outer, sibling = groups.pop() if groups else (0, 0)
            before, last = outer + sibling, whole
        elif any(named.get(key) is not None for key in ("one", "text", "regex", "name")):
            before, last = before + last, item(token)
    return before + last + sum(map(sum, groups))


def _check(name: str, size: int) -> None:
    if size > MOST_EXPANDED:
        raise ArrieroError(
            f"{name} comes to {size:,} characters with its repetitions written out",
            expected=f"at most {MOST_EXPANDED:,}",
            remedy="Repeat less, or by * and +",
        )
