"""A chat template's own letters, told from those that users write by stand-ins that no text can hold.

The template is rendered once more with stand-ins in what it writes itself. Where that is the same text, a control token
of stand-ins is the template's, whatever it does with the words of users in between: none of their letters is in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import product

from jinja2 import nodes
from jinja2.visitor import NodeTransformer

HALVES = range(0xD800, 0xE000)  # of surrogate pairs: no text that can be written as UTF-8 has them
_OWN, _OTHERS = re.compile("[\ud800-\udfff]+"), re.compile("[^\ud800-\udfff]+")
# What `%` and the filter `format` put something in the place of.
_CONVERSION = re.compile(r"(%)((?:\([^()]*\))?)([-#0 +]*(?:\*|\d*)(?:\.(?:\*|\d*))?[a-zA-Z])")


class OwnLetters:
    """The letters of control tokens, and a stand-in for each."""

    def __init__(self, tokens: Collection[str]) -> None:
        """Take the letters of `tokens`; those of more letters than there are stand-ins are never found."""
        letters = sorted(frozenset().union(*tokens))
        self._marks = dict(zip(map(ord, letters), map(chr, HALVES), strict=False))
        self._plain = {ord(mark): chr(letter) for letter, mark in self._marks.items()}
        self._visible = {letter: mark for letter, mark in self._marks.items() if not chr(letter).isspace()}
        # Words among control tokens stay as they are, since templates compare words.
        longest_first = sorted((token for token in tokens if not token.isidentifier()), key=len, reverse=True)
        self._tokens = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def mark(self, text: str) -> str:
        """`text` with stand-ins for all letters, but for spaces outside of control tokens, which templates trim.

        Those of a format's `%s` mean what they say; the key in its `%(key)s` is a word like any other.
        """
        parts = _CONVERSION.split(self.mark_tokens(text))  # text, "%", key, the rest, text, ..
        parts[::2] = [part.translate(self._visible) for part in parts[::2]]
        return "".join(parts)

    def mark_tokens(self, text: str) -> str:
        """`text` with stand-ins for the letters of whole control tokens."""
        return self._tokens.sub(lambda found: found.group().translate(self._marks), text)

    def plain(self, text: str) -> str:
        """`text` with letters for all stand-ins."""
        return _OWN.sub(lambda found: found.group().translate(self._plain), text)

    def only_own(self, text: str, filler: str) -> str:
        """What the stand-ins in `text` stand for, and `filler`, one character, in all other places."""
        return self.plain(_OTHERS.sub(lambda found: filler * len(found.group()), text))


@dataclass(frozen=True)
class Marking:
    """Where stand-ins are: for every letter or for whole control tokens, and in which of a template's words.

    `written` are those that are put out or joined to others, `elsewhere` those that are compared or handed on, where a
    stand-in may change what a template does. With `roles`, those of messages are the template's words too.
    """

    written: str  # "letters" or "tokens"
    elsewhere: str  # as those, or "none"
    roles: bool

    @property
    def is_thorough(self) -> bool:
        """Whether a control token without any stand-in was put together from words of users, or from parts."""
        return self.written == "letters" and self.elsewhere != "none"


# Every marking, those that say the most first.
MARKINGS = tuple(
    Marking(*each) for each in product(("letters", "tokens"), ("tokens", "letters", "none"), (True, False))
)


def marker(letters: OwnLetters, marking: Marking, roles: Collection[str]) -> NodeTransformer:
    """What puts stand-ins into a template as `marking` says; `roles` are all that the template knows."""
    return _Marker(letters, marking, roles)


class _Marker(NodeTransformer):
    def __init__(self, letters: OwnLetters, marking: Marking, roles: Collection[str]) -> None:
        marks: dict[str, Callable[[str], str]] = {"letters": letters.mark, "tokens": letters.mark_tokens, "none": str}
        self._written, self._elsewhere = marks[marking.written], marks[marking.elsewhere]
        self._mark = letters.mark
        self._roles = roles if marking.roles else ()

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        node.data = self._written(node.data)
        return node

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        if isinstance(node.value, str):
            node.value = (self._mark if node.value in self._roles else self._elsewhere)(node.value)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        if not isinstance(node.arg, nodes.Const):  # else the name of a key
            node.arg = self.visit(node.arg)
        node.node = self.visit(node.node)
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        node.nodes = [self._joined(each) for each in node.nodes]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        node.nodes = [self._joined(each) for each in node.nodes]
        return node

    def visit_Add(self, node: nodes.Add) -> nodes.Node:
        node.left, node.right = self._joined(node.left), self._joined(node.right)
        return node

    def _joined(self, node: nodes.Expr) -> nodes.Expr:
        """A part of what is put out or joined."""
        if isinstance(node, nodes.Const) and isinstance(node.value, str):
            node.value = self._written(node.value)
            return node
        if isinstance(node, nodes.CondExpr):
            node.test, node.expr1 = self.visit(node.test), self._joined(node.expr1)
            node.expr2 = None if node.expr2 is None else self._joined(node.expr2)
            return node
        visited: nodes.Expr = self.visit(node)
        return visited
