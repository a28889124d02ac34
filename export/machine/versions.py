"""The versions of installed distributions."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Iterable

from arriero.traits import Package


@functools.cache
def version_of(distribution: str) -> str | None:
    """Give the installed version of a distribution, or None; imports nothing of it."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def installed_versions(packages: Iterable[Package]) -> dict[str, str]:
    """The installed versions of what builds with `packages` depend on, those that stand in their place too."""
    names = [name for package in packages for name in (package.name, package.instead) if name]
    return {name: version for name in names if (version := version_of(name)) is not None}
