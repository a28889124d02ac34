"""Every name that our sources reach of NVIDIA's modules exists in each version that they may meet, and is recorded.

Read from the sources, so that it holds for paths that no test goes through. Where a name is called, the number and the
names of the arguments are checked too. And the recordings hold no more than that.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

import pytest

from tests.tensorrt.reached import MODULES, REFRESH, Chain, chains, cut, our_files, reach, what_we_reach
from tests.tensorrt.record_signatures import WHEELS, as_text
from tests.tensorrt.recorder import PRODUCTS, SIGNATURES, Form

BOTH = ("tensorrt_10", "tensorrt_11")
OF_RTX = {"ComputeCapability"}  # in a file of both products, reached after a look at which one it is
TEXTS = {name: (SIGNATURES / f"{name}.json").read_text() for name in WHEELS}
RECORDED = {name: json.loads(text) for name, text in TEXTS.items()}


def versions(chain: Chain) -> tuple[str, ...]:
    """The versions that a chain may meet: plugins are TensorRT's alone, a file of RTX is RTX's."""
    if chain.root == "trtp":
        return BOTH
    rtx = chain.names[0] in OF_RTX or chain.source.endswith("tensorrt_rtx.py")
    return ("tensorrt_rtx_1",) if rtx else PRODUCTS


def problem(recorded: dict[str, Any], names: tuple[str, ...], call: ast.Call | None) -> str | None:
    """What of `names` a version lacks, or how the call of the last differs from its forms."""
    first, *rest = names
    if first in recorded.get("enums", {}):
        members = {entry.partition("=")[0] for entry in recorded["enums"][first].split()}
        return None if not rest or rest[0] in members else f"{first} has no member {rest[0]}"
    if first in recorded.get("functions", {}):
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
    for kind in ("methods", "properties", "enums"):
        if name in described.get(kind, {}):
            if kind == "enums" and rest[1:] and f"{rest[1]}=" not in described["enums"][name]:
                return f"{owner}.{name} has no member {rest[1]}"
            return bound(described["methods"][name], call) if kind == "methods" else None
    found = [member(recorded, base, rest, call) for base in described.get("bases", ()) if base in recorded["classes"]]
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


def lacking(recorded: dict[str, Any], used: Chain) -> str | None:
    """What of a chain a version lacks."""
    section = MODULES[used.root]
    return problem(recorded[section] if section else recorded, used.names, used.call)


def leaves(part: Any, path: str = "") -> Iterator[str]:
    """Every name of a recording and every member of its enums, with where it stands."""
    if isinstance(part, dict):
        for name, inside in part.items():
            yield from leaves(inside, f"{path}/{name}")
    elif isinstance(part, str):
        yield from (f"{path}: {entry}" for entry in [part, *part.split()])
    else:
        yield path


def test_the_sources_reach_for_something():
    sources = {PurePath(chain.source).name for chain in what_we_reach().chains}
    assert sources >= {"engine.py", "products.py", "tensorrt_rtx.py", "tensorrt_api.py", "plugin.py", "fake_engine.py"}
    assert len(what_we_reach().chains) > 40


@pytest.mark.parametrize("version", PRODUCTS)
def test_every_name_exists_in_every_version_that_may_be_met(version):
    problems = [
        f"{used}: {problem}"
        for used in what_we_reach().chains
        if version in versions(used) and (problem := lacking(RECORDED[version], used))
    ]
    assert problems == [], f"Not in the recording; if the library has it, run: {REFRESH} {version}"


@pytest.mark.parametrize("version", ["cuda_12", "cuda_13"])
def test_every_name_of_cuda_is_recorded(version):
    """No function, kind or error is reached past the recorder."""
    ours, recorded = what_we_reach(), RECORDED[version]
    names = {name for name in ours.methods | ours.properties | ours.texts if re.match("cuda[A-Z]|cudaError_t", name)}
    members = {entry.partition("=")[0] for text in recorded["enums"].values() for entry in text.split()}
    known = recorded["functions"].keys() | recorded["enums"].keys() | members
    assert len(names) > 30
    problems = sorted(name for name in names - set(ours.prefixes) if name not in known)
    assert problems == [], f"Not in the recording; if CUDA has it, run: {REFRESH} {version}"


@pytest.mark.parametrize("version", WHEELS)
def test_a_recording_holds_nothing_that_no_source_reaches(version):
    recorded = RECORDED[version]
    kept = cut(recorded, what_we_reach())
    idle = set(leaves(recorded)) - set(leaves(kept))
    assert not idle, f"{sorted(idle)}: nothing reaches it any more; run: {REFRESH} {version}"
    assert TEXTS[version] == as_text(kept) + "\n", f"Written by hand? Run: {REFRESH} {version}"


def test_what_is_reached_is_kept_and_the_rest_is_cut():
    """A source that begins to use more of a class, of an enum and of plugins keeps these, and nothing else."""
    recorded = json.loads(TEXTS["tensorrt_11"])
    forms = {"reset": ["() -> None"], "is_network_supported": ["(network: INetworkDefinition) -> bool"]}
    recorded["classes"]["Builder"]["methods"] |= forms
    recorded["enums"]["BuilderFlag"] += " REFIT=4 DEBUG=2"
    recorded["plugin"]["functions"] |= {"impl": ["(plugin_id)"], "jit": ["(plugin_id)"]}
    recorded["classes"] |= {"IStreamWriter": {"init": ["() -> None"]}}
    assert cut(recorded, what_we_reach()) == RECORDED["tensorrt_11"]
    more = "# TensorRT\nbuilder.reset(trt.BuilderFlag.REFIT)\ntrtp.impl('a::b')\n"
    kept = cut(recorded, reach({**our_files(), "more.py": more}))
    added = {name.partition(": ")[0] for name in set(leaves(kept)) - set(leaves(RECORDED["tensorrt_11"]))}
    assert added == {"/classes/Builder/methods/reset", "/enums/BuilderFlag", "/plugin/functions/impl"}
    assert "REFIT=4" in kept["enums"]["BuilderFlag"]
    assert "DEBUG" not in kept["enums"]["BuilderFlag"]
    used = [lacking(RECORDED["tensorrt_11"], chain) for chain in chains(more)]
    assert used == ["BuilderFlag has no member REFIT", "there is no impl"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("trt.BuilderFlag.FP16", "BuilderFlag has no member FP16"),
        ("trt.Runtime()", "logger missing"),
        ("trt.Biulder(log)", "there is no Biulder"),
        ("self._trt.ILogger.Severity.WORSE", "ILogger.Severity has no member WORSE"),
        ("trt.Runtime.load_engine", "Runtime has no load_engine"),
        ("trtp.register('a::b', lazy=True)", "no argument 'lazy'"),
        ("trtp.KernelLaunchParams(grid_w=1)", "no argument 'grid_w'"),
        ("trtp.SymIntExprs.from_list([1])", "SymIntExprs has no from_list"),
        ("trt.ILogger.Severity.ERROR", None),
        ("trt.Dims((1, 2))", None),
        ("trtp.SymIntExprs.from_tuple([1])", None),
        ("self._trt.TensorIOMode.INPUT", None),
    ],
)
def test_the_check_itself(line, told):
    problem = lacking(RECORDED["tensorrt_11"], next(chains(line)))
    assert problem is None if told is None else told in str(problem)
