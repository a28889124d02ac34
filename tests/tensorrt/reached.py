"""Says what our code reaches of NVIDIA's Python modules, and cuts a recording to it: read from the sources alone.

`trt`, `_trt` and `module` are TensorRT's module, `trtp` its module of plugins; what stands behind these is known in
full. Of other objects no source says the class: a class that is reached keeps each member whose name one of our files
uses. The stand-ins add classes and errors that they name, but no members: what they answer, our code has to reach.
Classes within a signature stay, for the recorder checks them.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
REFRESH = "python -m tests.tensorrt.record_signatures"
MODULES = {"trt": None, "_trt": None, "module": None, "trtp": "plugin"}  # name in our code -> section of a recording
FOLDERS = ("runtimes", "export", "graphs")
STAND_INS = "tests/tensorrt/fake_*.py"
SPEAKS_OF_THEM = re.compile(r"TensorRT|cuda\.bindings")
NAMES = re.compile(r"(\w+\.)*\w+")


@dataclass(frozen=True)
class Chain:
    """`names` reached through the module `root` in the file `source`, and the call of the last if it is one."""

    source: str
    root: str
    names: tuple[str, ...]
    call: ast.Call | None

    def __str__(self) -> str:
        return f"{self.source}: {self.root}.{'.'.join(self.names)}"


def chains(text: str, source: str = "") -> Iterator[Chain]:
    """Every place where a file reaches through one of MODULES."""
    tree = ast.parse(text)
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
        if root in MODULES and names and not names[0].startswith("__"):
            yield Chain(source, root, tuple(names), calls.get(id(node)))


@dataclass(frozen=True)
class Reached:
    """What files reach: chains, methods and properties by name, texts that are names, and beginnings of such texts."""

    chains: tuple[Chain, ...]
    methods: frozenset[str]
    properties: frozenset[str]
    texts: frozenset[str]
    prefixes: tuple[str, ...]

    def through(self, section: str | None) -> set[tuple[str, ...]]:
        """The names that are reached through the module of a recording's section, None for the whole."""
        return {chain.names for chain in self.chains if MODULES[chain.root] == section}

    def cut_class(self, owner: str, described: Mapping[str, Any], section: str | None) -> dict[str, Any]:
        """The class `owner` of a recording without what is not reached."""
        through = {names[:2] for names in self.through(section)}

        def keep(kind: str, by_name: frozenset[str]) -> dict[str, Any]:
            members = described.get(kind, {}).items()
            return {name: form for name, form in members if name in by_name or (owner, name) in through}

        parts = {
            "bases": described.get("bases"),
            "init": described.get("init"),
            "methods": keep("methods", self.methods),
            "properties": keep("properties", self.properties),
            "enums": {name: self.cut_enum((owner, name), text, section) for name, text in keep("enums", NONE).items()},
        }
        return {key: part for key, part in parts.items() if part}

    def cut_enum(self, path: tuple[str, ...], members: str, section: str | None) -> str:
        """Of `NAME=number ..` those that are reached.

        By name where the enum itself is handed on, or no chain leads to it.
        """
        through = self.through(section)
        names = {chain[-1] for chain in through if chain[:-1] == path}
        prefixes: tuple[str, ...] = ()
        if path in through or not names:
            names, prefixes = names | self.properties | self.texts, self.prefixes
        entries = ((entry, entry.partition("=")[0]) for entry in members.split())
        return " ".join(entry for entry, name in entries if name in names or name.startswith(prefixes))


NONE: frozenset[str] = frozenset()


def our_files() -> dict[str, str]:
    """Those of our sources that speak of NVIDIA's modules, and the stand-ins: path -> text."""
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    texts = {path: path.read_text(encoding="utf-8") for path in sorted([*paths, *ROOT.glob(STAND_INS)])}
    return {path.relative_to(ROOT).as_posix(): text for path, text in texts.items() if SPEAKS_OF_THEM.search(text)}


@functools.cache
def what_we_reach() -> Reached:
    """What `our_files` reach."""
    return reach(our_files())


def reach(files: Mapping[str, str]) -> Reached:
    """What `files` reach: path -> text."""
    through: list[Chain] = []
    methods, properties, texts, prefixes = set[str](), set[str](), set[str](), set[str]()
    for source, text in files.items():
        through += chains(text, source)
        tree = ast.parse(text)
        calls = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        ours = _our_own(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr) and isinstance(start := node.values[0], ast.Constant):
                prefixes |= {start.value} if re.fullmatch(r"[A-Za-z]\w+", start.value) else set()
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and NAMES.fullmatch(node.value):
                texts.add(node.value)
            elif source.startswith("tests/"):
                continue
            elif isinstance(node, ast.ClassDef) and any(isinstance(base, ast.Attribute) for base in node.bases):
                methods |= {inside.name for inside in node.body if isinstance(inside, ast.FunctionDef)}
            elif isinstance(node, ast.Attribute) and getattr(node.value, "id", None) not in ours:
                (methods if id(node) in calls else properties).add(node.attr)
    every = (frozenset(names) for names in (methods, properties, texts))
    return Reached(tuple(through), *every, tuple(sorted(prefixes)))


def _our_own(tree: ast.AST) -> set[str]:
    """The names whose attributes are no members of NVIDIA's objects: what is imported, and `self`."""
    imports = (node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom))
    return {(name.asname or name.name).partition(".")[0] for node in imports for name in node.names} | {"self"}


def cut(recorded: Mapping[str, Any], reached: Reached, section: str | None = None) -> dict[str, Any]:
    """A recording (or one section of it) without what is not `reached`."""
    top = {names[0] for names in reached.through(section)}
    if section is None:
        top |= {text.partition(".")[0] for text in reached.texts}
        top |= {name for name in reached.methods | reached.properties if name.startswith("cuda")}
    functions = {name: forms for name, forms in recorded.get("functions", {}).items() if name in top}
    every, classes = recorded.get("classes", {}), dict[str, Any]()
    waiting = top & every.keys()
    while waiting:
        name = waiting.pop()
        classes[name] = reached.cut_class(name, every[name], section)
        waiting |= (_words(classes[name]) & every.keys()) - classes.keys()
    known = top | _words([functions, classes])
    enums = {
        name: reached.cut_enum((name,), members, section)
        for name, members in recorded.get("enums", {}).items()
        if name in known
    }
    parts: dict[str, Any] = {"enums": enums, "functions": functions, "classes": dict(sorted(classes.items()))}
    if "plugin" in recorded:
        parts["plugin"] = cut(recorded["plugin"], reached, "plugin")
    return {"version": recorded["version"]} | {key: part for key, part in parts.items() if part}


def _words(part: Any) -> set[str]:
    return set(re.findall(r"\w+", str(part)))
