"""Jinja for templates that strangers wrote: sandboxed, and bounded in time and in all that a rendering makes.

Every loop, call, filter, operator and output passes through a `Budget`, which ends the rendering. What one step makes
is bounded before it is made, by the sizes that go in.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from typing import Any

from jinja2 import TemplateError, nodes, pass_context
from jinja2.environment import Template
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer, NodeVisitor

SECONDS = 10.0
LEAST_WORK = 20_000_000  # characters and entries that every template may make
WORK_PER_CHARACTER = 64  # of the messages, on top
MOST_BITS = 100_000  # of a number


class TemplateTooMuch(TemplateError):
    """A rendering wants more time or more memory than it may have."""


class Budget:
    """What a rendering may still make, in characters and list entries, and until when."""

    def __init__(self, work: int) -> None:
        self.work, self.deadline = work, time.monotonic() + SECONDS

    def spend(self, amount: int) -> None:
        """Take `amount`. Raises TemplateTooMuch when nothing is left."""
        self.work -= amount
        if self.work < 0:
            raise TemplateTooMuch("it makes far more text than the messages hold")
        if time.monotonic() > self.deadline:
            raise TemplateTooMuch(f"it runs longer than {SECONDS:.0f} seconds")

    def weigh(self, value: Any) -> int:
        """The characters and entries of a value, nested ones included. Raises TemplateTooMuch beyond what is left."""
        total, stack = 0, [value]
        while stack:
            item = stack.pop()
            if isinstance(item, str | bytes):
                total += len(item)
            elif isinstance(item, Mapping):
                stack += [*item.keys(), *item.values()]
            elif isinstance(item, list | tuple | set | frozenset):
                stack += item
            total += 1
            if total > self.work:
                raise TemplateTooMuch("it makes far more text than the messages hold")
        return total

    def foresee(self, *values: Any) -> None:
        """Refuse a step whose result may grow with the product of what goes into it: a width, a count, a separator."""
        product = 1
        for value in values:
            product *= max(abs(value) if isinstance(value, int) else self.weigh(value) if _is_data(value) else 1, 1)
        if product > self.work and any(map(_is_data, values)):
            raise TemplateTooMuch("it makes far more text than the messages hold")


class _Local(threading.local):
    budget: Budget | None = None


_local = _Local()


def _current() -> Budget:
    # Without one, jinja computes a constant of the template while it compiles it.
    return _local.budget or Budget(LEAST_WORK)


def _is_data(value: Any) -> bool:
    return isinstance(value, str | bytes | Mapping | list | tuple | set | frozenset)


def _pay(value: Any) -> Any:
    """`value`, once the budget has paid for it."""
    budget = _current()
    budget.spend(budget.weigh(value) if _is_data(value) else 1)
    return value


def _check_widths(text: Any) -> None:
    """Refuse a format string that asks for padding beyond all sense."""
    if isinstance(text, str) and re.search(r"\d{6}", text):
        raise TemplateTooMuch("it pads text to a width of six digits")


@pass_context  # so that jinja does not compute it, once and for all, while it compiles
def _paid(context: Context, value: Any) -> Any:
    return _pay(value)


@pass_context
def _paid_rounds(context: Context, items: Any) -> Any:
    """What a loop runs over: every round is paid for."""
    return _Rounds(items) if isinstance(items, Iterable) else items  # jinja says what is wrong with others


@pass_context
def _paid_text(context: Context, parts: list[Any]) -> str:
    return "".join(str(_pay(part)) for part in parts)


class _Rounds:
    def __init__(self, items: Iterable[Any]) -> None:
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        budget = _current()
        for item in self._items:
            budget.spend(1)
            yield item

    def __len__(self) -> int:
        return len(self._items)  # type: ignore[arg-type]  # a TypeError has jinja count them


HOOKS = {"arriero_paid": _paid, "arriero_paid_rounds": _paid_rounds, "arriero_paid_text": _paid_text}


def _hooked(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Meter(NodeTransformer):
    """Puts the budget between a template's loops, literals and outputs, and what comes of them."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        assert isinstance(node.iter, nodes.Expr)
        node.iter = _hooked(node.iter, "arriero_paid_rounds")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _hooked(nodes.List(node.nodes, lineno=node.lineno), "arriero_paid_text")

    def _literal(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") != "load" else _hooked(node, "arriero_paid")

    visit_List = visit_Tuple = visit_Dict = _literal

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        texts: list[nodes.Expr] = [
            nodes.Const(n.data, lineno=n.lineno) if isinstance(n, nodes.TemplateData) else n for n in node.nodes
        ]
        node.nodes = [_hooked(text, "arriero_paid") for text in texts]
        return node


class _Generation(Extension):
    """`{% generation %}`, with which fine-tuning tools mark the assistant's words: they are rendered as they stand."""

    tags = {"generation"}  # noqa: RUF012  # as jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("words"), [], [], body, lineno=lineno)

    def words(self, caller: Callable[[], str]) -> str:
        return caller()


class _Namespace(Namespace):
    """Jinja's namespace without the names through which a template could reach what is inside it."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # as jinja's, so that `namespace(self=..)` works
        names = dict(*args[1:], **kwargs)
        for name in names:
            _Namespace._check(name)
        Namespace.__init__(args[0], names)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}")


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The environment of Hugging Face's chat templates, with a budget for each rendering."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, rewrite: NodeVisitor | None = None) -> None:
        """Let `rewrite` change the nodes of every template, before the budget is put around them."""
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self._rewrite = rewrite
        self.globals["namespace"] = _Namespace
        del self.globals["lipsum"]  # makes text out of nothing
        self.filters["tojson"] = _to_json
        self.filters = {name: _bounded_filter(name, function) for name, function in self.filters.items()} | HOOKS

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = super()._parse(source, name, filename)
        tree = _Meter().visit(tree if self._rewrite is None else self._rewrite.visit(tree))
        tree.set_environment(self)
        return tree

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # as jinja's
        """Call an object of the template's, within the budget."""
        method = getattr(__obj, "__wrapped__", __obj)
        owner = getattr(method, "__self__", None)
        if getattr(method, "__name__", "") in ("format", "format_map"):
            _check_widths(owner)
        _current().foresee(owner, *args, *kwargs.values())
        return _pay(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Apply an operator within the budget."""
        if operator == "%":
            _check_widths(left)
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * (max(right, 1) if operator == "**" else 1) + right.bit_length()
            if bits > MOST_BITS:
                raise TemplateTooMuch(f"it computes with numbers of more than {MOST_BITS:,} bits")
        elif operator != "+":
            _current().foresee(left, right)
        return _pay(super().call_binop(context, operator, left, right))

    def render(self, template: Template, variables: Mapping[str, Any]) -> str:
        """The text of a template of this environment. Raises whatever a stranger's program may."""
        size = Budget(sys.maxsize).weigh(variables)
        _local.budget = Budget(LEAST_WORK + WORK_PER_CHARACTER * size)
        try:
            return template.render(variables)
        finally:
            _local.budget = None


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        values = [*args, *kwargs.values()]
        if name == "format":
            _check_widths(next(filter(_is_data, values), None))
        _current().foresee(*values)
        return _pay(function(*args, **kwargs))

    return bounded


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # jinja2's own filter escapes HTML, which no model was trained on
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
