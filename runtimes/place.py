"""Where a conversation stands: its tokens, its tiles, and the keys and values of what was read of it; kept in a file.

Shapes: S tokens, n tiles.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from arriero.errors import ArrieroError
from arriero.runtimes.backend import Floats, Ints, ModelSpec
from arriero.runtimes.snapshot import Snapshot

FORMAT = 1


@dataclass(frozen=True, eq=False)
class Place:
    """The ids i64 [S] of a conversation, its tiles f32 [n, 3, h, w] or None, and a row that has read the first ids."""

    ids: Ints
    tiles: Floats | None
    snapshot: Snapshot

    def shared(self, ids: Ints) -> int:
        """How many of the tokens read `ids` begin with and a row can be cut to, short of the last of `ids`."""
        read = self.snapshot.length
        count = min(read, len(ids) - 1)
        differ = np.flatnonzero(self.ids[:count] != ids[:count])
        count = int(differ[0]) if len(differ) else count
        chunk = self.snapshot.spec.attention_chunk_size
        return count if count >= read // chunk * chunk else count // chunk * chunk

    def save(self, path: str | os.PathLike[str], said: Mapping[str, Any]) -> None:
        """Write the place to `path`, whole or not at all, with what else is `said` of it as JSON.

        Raises ArrieroError where it cannot be written.
        """
        snapshot = self.snapshot
        head = {"format": FORMAT, "length": snapshot.length, "adapter": snapshot.adapter, "said": said}
        arrays = {"head": np.frombuffer(json.dumps(head).encode(), np.uint8), "ids": self.ids}
        if self.tiles is not None:
            arrays["tiles"] = self.tiles
        for kind, buffers in (("key", snapshot.keys), ("value", snapshot.values)):
            arrays |= {f"{kind}.{layer}": buffer for layer, buffer in enumerate(buffers)}
        target = Path(path)
        try:
            with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
                try:
                    np.savez(file, **arrays)  # type: ignore[arg-type]
                    file.flush()
                    os.replace(file.name, target)
                except BaseException:
                    Path(file.name).unlink(missing_ok=True)
                    raise
        except (OSError, ValueError) as error:  # a path with a zero byte is a ValueError
            what = f"the conversation cannot be written ({getattr(error, 'strerror', None) or error})"
            raise ArrieroError(what, where=str(path), remedy="Give a path that can be written") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str], spec: ModelSpec) -> tuple[Self, dict[str, Any]]:
        """Read what `save` wrote for the model `spec`. Raises ArrieroError for a file that is something else."""
        try:
            with np.load(path, allow_pickle=False) as archive:
                if sum(one.file_size for one in archive.zip.infolist()) > os.path.getsize(path):
                    raise ValueError("it is compressed, and holds more than its own size")  # `save` compresses nothing
                head = json.loads(archive["head"].tobytes())
                if head["format"] != FORMAT:
                    raise ValueError(f"its format is {head['format']}")
                tiles = archive["tiles"] if "tiles" in archive.files else None
                keys, values = (
                    tuple(archive[f"{kind}.{layer}"] for layer in range(len(spec.layers))) for kind in ("key", "value")
                )
                snapshot = Snapshot(spec, int(head["length"]), keys, values, int(head["adapter"]))
                snapshot.check_shapes()
                ids = archive["ids"]
                if ids.dtype != np.int64 or ids.ndim != 1 or not isinstance(head["said"], dict):
                    raise ValueError("its tokens are no list of ids, or what was said is missing")
                return cls(ids, tiles, snapshot), head["said"]
        except FileNotFoundError:
            raise ArrieroError("there is no such file", where=str(path), remedy="Check the path") from None
        except Exception as error:  # numpy's and zipfile's parsers raise whatever a stranger's bytes make them
            raise no_conversation(path, error) from None


def no_conversation(path: str | os.PathLike[str], error: Exception) -> ArrieroError:
    """What is said of a file in which `error` was met."""
    return ArrieroError(
        f"this is no saved conversation of the model ({error or type(error).__name__})",
        where=str(path),
        expected="a file that `Chat.save` wrote",
        remedy="Start a new conversation",
    )
