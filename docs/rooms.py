"""The rooms of the package, top to bottom, and who imports whom, read from the sources; draws `docs/rooms.svg`.

python docs/rooms.py
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = Path(__file__).with_name("rooms.svg")

# Each top folder's rooms, the upper ones first: a room imports itself and the rooms below it, never one above.
# A room is a folder, or `*` for the files that lie in the top folder itself, or some of these by name.
ROOMS: dict[str, dict[str, tuple[str, ...]]] = {
    "export": {
        "cli": ("cli", "__main__.py"),
        "pipeline": ("pipeline",),
        "calibration": ("calibration",),
        "proof": ("proof",),
        "samples": ("samples",),
        "build_file": ("build_file",),
        "machine": ("machine",),
        "compile": ("compile",),
    },
    "graphs": {
        "lower": ("lower",),
        "trace": ("trace.py", "check.py"),
        "passes": ("passes",),
        "stored": ("stored",),
        "model": ("*",),
    },
    "profiles": {"profiles": ("*",), "data": ("data",)},
    "runtimes": {
        "remote": ("remote.py",),
        "proof": ("proof",),
        "session": ("api.py", "session.py", "generation.py"),
        "processor": ("processor",),
        "backends": ("onnxruntime.py", "tvm.py", "tensorrt.py", "tensorrt_rtx.py"),
        "nvidia": ("nvidia",),
        "contract": ("*",),
    },
}
# Which top folders a folder may import besides itself.
MAY_IMPORT = {
    "profiles": set(),
    "runtimes": set(),
    "graphs": {"profiles"},
    "export": {"profiles", "runtimes", "graphs"},
    "models": {"profiles", "runtimes", "graphs", "export"},
}


def room_of(module: str) -> tuple[str, str] | None:
    """The (top folder, room) of a module's path, as in `export/proof/prove.py`; None outside the rooms."""
    folder, _, rest = module.partition("/")
    if folder not in ROOMS or rest == "__init__.py":
        return None
    name = rest.partition("/")[0]
    rooms = ROOMS[folder]
    exact = next((room for room, members in rooms.items() if name in members), None)
    return folder, exact or next(room for room, members in rooms.items() if "*" in members)


def imported(source: str) -> Iterator[str]:
    """Full names of the modules that the file `source` imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse((ROOT / source).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{source}:{node.lineno} imports relatively"
            # `from arriero.graphs import trace` imports arriero.graphs.trace
            parts = [f"{node.module}.{name.name}" for name in node.names]
            yield from (part if _path(part) else node.module for part in parts)


def _path(module: str) -> str | None:
    """The path of one of our modules, relative to the root; None for what is none."""
    if not module.startswith("arriero."):
        return None
    path = module.removeprefix("arriero.").replace(".", "/")
    candidates = (f"{path}.py", f"{path}/__init__.py")
    return next((candidate for candidate in candidates if (ROOT / candidate).is_file()), None)


def sources(folder: str) -> list[str]:
    """The Python files of a top folder, relative to the root."""
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.py"))


def edges() -> dict[tuple[tuple[str, str], tuple[str, str]], set[str]]:
    """(room, imported room) -> the files that import it, for every pair of different rooms."""
    found: dict[tuple[tuple[str, str], tuple[str, str]], set[str]] = {}
    for folder in ROOMS:
        for source in sources(folder):
            here = room_of(source)
            for module in imported(source):
                path = _path(module)
                there = room_of(path) if path else None
                if here and there and here != there:
                    found.setdefault((here, there), set()).add(source)
    return found
