"""The user's folder for what costs a machine time to make and nothing but time to lose."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "ARRIERO_CACHE"


def user_cache() -> Path | None:
    """`$ARRIERO_CACHE`, else `arriero` in `$XDG_CACHE_HOME` or `~/.cache`; None where the variable is set and empty.

    The folder need not be there.
    """
    if (chosen := os.environ.get(VARIABLE)) is not None:
        return Path(chosen).expanduser() if chosen else None
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "arriero"
    except RuntimeError:  # a process without a home
        return None
