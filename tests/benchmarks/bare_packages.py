"""The packages that a machine which only runs kernels has."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def link_bare_packages(folder: Path) -> None:
    """Put numpy and ml_dtypes, and nothing else, into `folder`, for a Python without site-packages."""
    for name in ("numpy", "ml_dtypes"):
        spec = importlib.util.find_spec(name)
        assert spec is not None
        package = Path(str(spec.origin)).parent
        for path in (package, package.with_name(f"{name}.libs")):
            if path.is_dir():
                (folder / path.name).symlink_to(path)
