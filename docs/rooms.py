"""The rooms of the package, top to bottom, and who imports whom, read from the sources; draws `docs/rooms.svg`.

python docs/rooms.py
"""

from __future__ import annotations

from pathlib import Path

from arriero.export.pipeline.sources import PACKAGE as ROOT
from arriero.export.pipeline.sources import imports, path_of

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
        "session": ("api.py", "session.py", "generation.py", "settings.py"),
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


def sources(folder: str) -> list[str]:
    """The Python files of a top folder, relative to the root."""
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.py"))


def edges() -> dict[tuple[tuple[str, str], tuple[str, str]], set[str]]:
    """(room, imported room) -> the files that import it, for every pair of different rooms."""
    found: dict[tuple[tuple[str, str], tuple[str, str]], set[str]] = {}
    for folder in ROOMS:
        for source in sources(folder):
            here = room_of(source)
            for module in imports(source):
                path = path_of(module)
                there = room_of(path) if path else None
                if here and there and here != there:
                    found.setdefault((here, there), set()).add(source)
    return found
