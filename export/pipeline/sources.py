"""A hash over those of our sources that can change a result: what a module imports, and what that imports in turn.

Other code, other results, so a stage's key holds the hash of its own code; and no other code's, so that an edited page
template or a doctor's sentence does not calibrate everything anew.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2]
NAME = "arriero"
STATEMENTS = ("body", "orelse", "finalbody", "handlers", "cases")  # where statements hold others
DATA = (".cc", ".cu", ".h")  # what modules compile, found by its folder rather than imported


@functools.cache
def source_hash(*entries: str) -> str:
    """The sha256 over `entries` and over every module of ours that they import, directly or not.

    An entry is a module's path as in `graphs/trace.py`, or a folder, with the C++ and CUDA that lie in it.
    """
    digest = hashlib.sha256()
    for name in sorted(closure(entries)):
        digest.update(f"{name}\0".encode())
        digest.update(hashlib.sha256((PACKAGE / name).read_bytes()).digest())
    return digest.hexdigest()


def closure(entries: tuple[str, ...]) -> set[str]:
    """The files of `entries` and of what they import, relative to the package."""
    pending = [name for entry in entries for name in _files(entry)]
    reached: set[str] = set()
    while pending:
        name = pending.pop()
        if name in reached:
            continue
        reached.add(name)
        if name.endswith(".py"):
            pending += [path for module in imports(name, typing=False) if (path := path_of(module)) is not None]
    return reached


@functools.cache
def imports(name: str, typing: bool = True) -> tuple[str, ...]:
    """Full names of the modules that the file `name` imports, wherever in it; without those for types alone if not
    `typing`.
    """
    return tuple(_imports(name, typing))


def _imports(name: str, typing: bool) -> Iterator[str]:
    pending: list[ast.AST] = [ast.parse((PACKAGE / name).read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if not typing and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        for part in STATEMENTS:  # an import is never inside an expression, and most of a module's nodes are
            pending += getattr(node, part, ())
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno} imports relatively"
            parts = [f"{node.module}.{alias.name}" for alias in node.names]
            # `from arriero.graphs import trace` imports arriero.graphs.trace; of other names, the module they are in
            yield from (part if path_of(part) else str(node.module) for part in parts)


def path_of(module: str) -> str | None:
    """The path of one of our modules, relative to the package; None for what is none."""
    if not module.startswith(f"{NAME}."):
        return None
    path = module.removeprefix(f"{NAME}.").replace(".", "/")
    return next((name for name in (f"{path}.py", f"{path}/__init__.py") if (PACKAGE / name).is_file()), None)


def _files(entry: str) -> list[str]:
    folder = PACKAGE / entry
    if not folder.is_dir():
        return [entry]
    return [path.relative_to(PACKAGE).as_posix() for path in folder.rglob("*") if path.suffix in (".py", *DATA)]
