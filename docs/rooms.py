"""The rooms of the package, top to bottom, and who imports whom, read from the sources; draws `docs/rooms.svg`.

python docs/rooms.py
"""

from __future__ import annotations

from pathlib import Path

from arriero.export.pipeline.sources import PACKAGE as ROOT
from arriero.export.pipeline.sources import imports, path_of

PICTURE = Path(__file__).with_name("rooms.svg")
Room = tuple[str, str]  # top folder, room

# Each top folder's rooms, the upper ones first: a room imports itself and the rooms below it, never one above.
# A room is a folder, or `*` for the files that lie in the top folder itself, or some of these by name.
ROOMS: dict[str, dict[str, tuple[str, ...]]] = {
    "export": {
        "cli": ("cli", "__main__.py"),
        "store": ("store",),
        "cluster": ("cluster",),
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
        "rewrite": ("rewrite",),
        "stored": ("stored",),
        "checkpoint": ("checkpoint.py", "sources"),
        "model": ("*",),
    },
    "profiles": {"profiles": ("*",), "data": ("data",)},
    "runtimes": {
        "remote": ("remote.py",),
        "proof": ("proof",),
        "server": ("server",),
        "session": ("api.py", "session.py", "chat_session.py", "check_prompt.py", "routing_trace.py"),
        "engine": (
            *("engine.py", "scheduler.py", "decode_step.py", "pace.py", "interlude.py", "running_rows.py"),
            *("request.py", "stream.py"),
            *("prefix_cache.py", "place.py", "prompt_lookup.py"),
            *("draft_length.py", "draft_model.py"),
            *("generation.py", "stop_text.py", "settings.py"),
        ),
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


def room_of(module: str) -> Room | None:
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


def edges() -> dict[tuple[Room, Room], set[str]]:
    """(room, imported room) -> the files that import it, for every pair of different rooms."""
    importers: dict[tuple[Room, Room], set[str]] = {}
    for folder in ROOMS:
        for source in sources(folder):
            here = room_of(source)
            for module in imports(source):
                path = path_of(module)
                there = room_of(path) if path else None
                if here and there and here != there:
                    importers.setdefault((here, there), set()).add(source)
    return importers


# --- the picture

COLUMN, GAP, LINE, PADDING = 232, 40, 15, 10
PALETTE = {"export": "#e8eef7", "graphs": "#eaf4ea", "profiles": "#fbf3e2", "runtimes": "#f6e9ee"}
CSS = (
    "text{font:12px system-ui,sans-serif;fill:#222}.folder{font-weight:600;font-size:15px}.room{font-weight:600}"
    ".uses{fill:#555;font-size:11px}.box{stroke:#8a93a0}.arrow{fill:none;stroke:#8a93a0}"
)


def draw() -> str:
    """The rooms as SVG: a column per top folder, upper rooms first, an arc for each import of a room by one above it.

    What a room imports of other folders stands in its box.
    """
    pairs = sorted(edges())
    parts: list[str] = []
    bottoms = [_column(folder, index, pairs, parts) for index, folder in enumerate(ROOMS)]
    width, height = len(ROOMS) * (COLUMN + GAP) + GAP, max(bottoms) + PADDING
    head = '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
    head += '<path d="M0 0L8 4L0 8z" fill="#8a93a0"/></marker>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">\n'
        f"<title>The rooms of the package, and who imports whom</title>\n<style>{CSS}</style>\n<defs>{head}</defs>\n"
        f'<rect width="{width}" height="{height}" fill="#fff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _column(folder: str, index: int, pairs: list[tuple[Room, Room]], parts: list[str]) -> int:
    """Add one folder's rooms and arcs to `parts`; give where they end."""
    left, top = GAP + index * (COLUMN + GAP), 46
    parts.append(f'<text class="folder" x="{left}" y="26">{folder}/</text>')
    spans: dict[str, tuple[int, int]] = {}
    for room in ROOMS[folder]:
        lines = _used(folder, room, pairs)
        height = 2 * PADDING + LINE * (1 + len(lines))
        box = f'x="{left}" y="{top}" width="{COLUMN - GAP}" height="{height}" rx="5" fill="{PALETTE[folder]}"'
        parts.append(f'<rect class="box" {box}/>')
        parts.append(f'<text class="room" x="{left + PADDING}" y="{top + PADDING + 11}">{room}</text>')
        for number, line in enumerate(lines, 1):
            y = top + PADDING + 11 + number * LINE
            parts.append(f'<text class="uses" x="{left + PADDING}" y="{y}">{line}</text>')
        spans[room] = top, top + height
        top += height + 14
    right = left + COLUMN - GAP
    order = list(ROOMS[folder])
    for above, below in pairs:
        if above[0] == below[0] == folder:
            start, end = (sum(spans[room]) // 2 for room in (above[1], below[1]))
            reach = 8 + 7 * (order.index(below[1]) - order.index(above[1]))
            curve = f"M{right} {start}C{right + reach} {start} {right + reach} {end} {right} {end}"
            parts.append(f'<path class="arrow" d="{curve}" marker-end="url(#tip)"/>')
    return top


def _used(folder: str, room: str, pairs: list[tuple[Room, Room]]) -> list[str]:
    """What a room imports of other folders, a line for each."""
    lines = []
    for other in ROOMS:
        names = [there[1] for here, there in pairs if here == (folder, room) and there[0] == other != folder]
        if names:
            lines += _wrapped(f"{other}: ", names)
    return lines


def _wrapped(start: str, names: list[str], most: int = 31) -> list[str]:
    lines = [start + names[0]]
    for name in names[1:]:
        if len(lines[-1]) + 2 + len(name) <= most:
            lines[-1] += f", {name}"
        else:
            lines[-1] += ","
            lines.append(f"\u2003{name}")
    return lines


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
