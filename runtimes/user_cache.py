"""The user's folder for what costs a machine time to make and nothing but time to lose."""

from __future__ import annotations

import os
from pathlib import Path

from arriero.runtimes.home import expand_home

VARIABLE = "ARRIERO_CACHE"


def user_cache() -> Path | None:
    """`$ARRIERO_CACHE`, else `arriero` in `$XDG_CACHE_HOME` or `~/.cache`; None where the variable is set and empty.

    The folder need not be there. Raises ArrieroError for one in the home of nobody.
    """
    if (chosen := os.environ.get(VARIABLE)) is not None:
        return expand_home(chosen, VARIABLE) if chosen else None
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "arriero"
    except RuntimeError:  # a process without a home
        return None
