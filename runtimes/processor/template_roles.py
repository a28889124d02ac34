"""The roles that a chat template knows: the words that it compares the role of a message with."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from jinja2 import nodes

ROLES = ("system", "user", "assistant", "tool", "ipython")  # that every Llama 4 knows
PICKS = ("selectattr", "rejectattr")  # filters that compare a key of each message


def roles_of(tree: nodes.Template) -> frozenset[str]:
    """ROLES, and the words that the template `tree` compares roles with, or looks up by them."""
    assigned = [
        (each.target.name, each.node) for each in tree.find_all(nodes.Assign) if isinstance(each.target, nodes.Name)
    ]
    names = {"role"} | {name for name, node in assigned if _is_role(node, ("role",))}

    def words(node: nodes.Node) -> Iterator[str]:
        same = [value for name, value in assigned if name == node.name] if isinstance(node, nodes.Name) else [node]
        for each in same:
            yield from _literals(each)

    found = [*ROLES]
    for compare in tree.find_all(nodes.Compare):
        sides = [compare.expr, *(operand.expr for operand in compare.ops)]
        others = [side for side in sides if not _is_role(side, names)]
        found += [word for side in others for word in words(side)] if len(others) < len(sides) else []
    for test in tree.find_all(nodes.Test):
        if _is_role(test.node, names):
            found += [word for argument in test.args for word in words(argument)]
    for item in tree.find_all(nodes.Getitem):
        if _is_role(item.arg, names):
            found += words(item.node)
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr) and call.args and _is_role(call.args[0], names):
            found += words(call.node.node)
    for pick in tree.find_all(nodes.Filter):
        if pick.name in PICKS and pick.args and _is_word(pick.args[0], "role"):
            found += [word for argument in pick.args[2:] for word in words(argument)]
    return frozenset(word for word in found if re.fullmatch(r"[\w-]+", word))


def _literals(node: nodes.Node) -> Iterator[str]:
    """The texts in a literal, the keys of a mapping; what the budget of a rendering is put around is looked into."""
    match node:
        case nodes.Const():
            yield node.value if isinstance(node.value, str) else ""
        case nodes.List() | nodes.Tuple():
            for item in node.items:
                yield from _literals(item)
        case nodes.Dict():
            for pair in node.items:
                yield from _literals(pair.key)
        case nodes.Filter() if node.node is not None:
            yield from _literals(node.node)


def _is_role(node: nodes.Node | None, names: Collection[str]) -> bool:
    """Whether `node` is a message's role, as it stands or in other letters."""
    match node:
        case nodes.Name():
            return node.name in names
        case nodes.Getattr():
            return node.attr == "role" or _is_role(node.node, names)
        case nodes.Getitem():
            return _is_word(node.arg, "role")
        case nodes.Filter():
            return _is_role(node.node, names)
        case nodes.Call():
            return _is_role(node.node, names) or any(_is_word(argument, "role") for argument in node.args[:1])
    return False


def _is_word(node: nodes.Node, word: str) -> bool:
    return isinstance(node, nodes.Const) and node.value == word
