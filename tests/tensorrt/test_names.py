"""Every name that our sources reach through TensorRT's modules exists in each version that they may meet.

Read from the sources, so that it holds for paths that no test goes through. `trt` and `_trt` are the module, `trtp` its
module of plugins. Where one stands before a call, the number and the names of the arguments are checked too.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tensorrt.recorder import PRODUCTS, SIGNATURES, Form

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("runtimes", "export", "graphs")
    for path in (ROOT / folder).rglob("*.py")
)
MODULES = {"trt": None, "_trt": None, "trtp": "plugin"}
BOTH = ("tensorrt_10", "tensorrt_11")
RECORDED = {name: json.loads((SIGNATURES / f"{name}.json").read_text()) for name in PRODUCTS}
NOT_RECORDED = {"__version__"}  # a text, neither called nor made


def chains(source: str) -> Iterator[tuple[str, tuple[str, ...], ast.Call | None]]:
    """Each module's name, the names that are reached through it, and the call of the last if it is one."""
    tree = ast.parse(source)
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or id(node) in inner:
            continue
        names: list[str] = []
        place: ast.expr = node
        while isinstance(place, ast.Attribute) and place.attr not in MODULES:
            names.insert(0, place.attr)
            place = place.value
        root = place.attr if isinstance(place, ast.Attribute) else getattr(place, "id", None)
        if root in MODULES and names:
            yield root, tuple(names), calls.get(id(node))


def versions(source: str, root: str) -> tuple[str, ...]:
    """The versions that a file may meet: plugins are TensorRT's alone, and the file of RTX is RTX's."""
    if root == "trtp" or "/cuda/" in source:
        return BOTH
    return ("tensorrt_rtx_1",) if source.endswith("tensorrt_rtx.py") else PRODUCTS


def problem(recorded: dict[str, Any], names: tuple[str, ...], call: ast.Call | None) -> str | None:
    """What of `names` a version lacks, or how the call of the last differs from its forms."""
    first, *rest = names
    if first in NOT_RECORDED or first in recorded.get("values", {}):
        return None
    if first in recorded.get("enums", {}):
        members = {entry.partition("=")[0] for entry in recorded["enums"][first].split()}
        return None if not rest or rest[0] in members else f"{first} has no member {rest[0]}"
    if first in recorded["functions"]:
        return bound(recorded["functions"][first], call)
    if first not in recorded["classes"]:
        return f"there is no {first}"
    return member(recorded, first, rest, call)


def member(recorded: dict[str, Any], owner: str, rest: list[str], call: ast.Call | None) -> str | None:
    described = recorded["classes"][owner]
    if not rest:
        return bound(described["init"], call) if described.get("init") else None
    name = rest[0]
    if name == "__init__":  # a base called by name: the object itself comes first
        return None
    for kind in ("methods", "properties", "enums", "constants"):
        if name in described.get(kind, {}):
            if kind == "enums" and rest[1:] and f"{rest[1]}=" not in described["enums"][name]:
                return f"{owner}.{name} has no member {rest[1]}"
            return bound(described["methods"][name], call) if kind == "methods" else None
    found = [member(recorded, base, rest, call) for base in described["bases"] if base in recorded["classes"]]
    return None if None in found else f"{owner} has no {name}"


def bound(forms: list[str], call: ast.Call | None) -> str | None:
    if (
        call is None
        or any(isinstance(one, ast.Starred) for one in call.args)
        or any(k.arg is None for k in call.keywords)
    ):
        return None
    named = {str(keyword.arg): None for keyword in call.keywords}
    told = [Form.parse(form).bind((None,) * len(call.args), named) for form in forms]
    return None if any(isinstance(one, dict) for one in told) else f"it does not take that call: {told[0]}"


USED = [
    (source, root, names, call)
    for source in SOURCES
    for root, names, call in chains((ROOT / source).read_text(encoding="utf-8"))
]


def test_the_sources_reach_for_something():
    assert {source for source, *_ in USED} >= {
        "runtimes/nvidia/engine.py",
        "runtimes/nvidia/products.py",
        "runtimes/tensorrt_rtx.py",
    }
    assert len(USED) > 10


@pytest.mark.parametrize("version", PRODUCTS)
def test_every_name_exists_in_every_version_that_may_be_met(version):
    problems = []
    for source, root, names, call in USED:
        if version in versions(source, root):
            section = MODULES[root]
            recorded = RECORDED[version][section] if section else RECORDED[version]
            if found := problem(recorded, names, call):
                problems.append(f"{source}: {root}.{'.'.join(names)}: {found}")
    assert problems == []


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("trt.BuilderFlag.FP16", "BuilderFlag has no member FP16"),
        ("trt.Refitter(engine)", "logger missing"),
        ("trt.Biulder(log)", "there is no Biulder"),
        ("self._trt.ILogger.Severity.WORSE", "ILogger.Severity has no member WORSE"),
        ("trt.Runtime.load_engine", "Runtime has no load_engine"),
        ("trtp.register('a::b', lazy=True)", "no argument 'lazy'"),
        ("trtp.KernelLaunchParams(grid_w=1)", "no argument 'grid_w'"),
        ("trtp.SymIntExprs.from_list([1])", "SymIntExprs has no from_list"),
        ("trt.Logger.WARNING", None),
        ("trt.Weights(trt.DataType.FLOAT, 1, 2)", None),
        ("trtp.SymIntExprs.from_tuple([1])", None),
        ("self._trt.TensorIOMode.INPUT", None),
    ],
)
def test_the_check_itself(line, told):
    ((root, names, call), *_) = list(chains(line))
    section = MODULES[root]
    recorded = RECORDED["tensorrt_11"][section] if section else RECORDED["tensorrt_11"]
    found = problem(recorded, names, call)
    assert found is None if told is None else told in str(found)
