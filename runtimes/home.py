"""Paths that begin with `~` where no shell expands it: in files and in the environment."""

from __future__ import annotations

from pathlib import Path

from arriero.errors import ArrieroError


def expand_home(path: str, where: str | None = None) -> Path:
    """`path` with `~` or `~user` in place of that home folder. Raises ArrieroError at `where` for nobody's."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        home = Path(path).parts[0]
        raise ArrieroError(
            f"{path} begins with a home folder that is not known",
            where=where,
            expected=f"a folder for {home}" if home == "~" else f"`~` for your own, or a user {home[1:]}",
            remedy="Write the path in full",
        ) from None
