"""A released package as its index has it, kept outside the repository: suites that nobody here wrote come in them."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "arriero" / "packages"


class NotFetchedError(Exception):
    """The package index does not answer, or has no such package."""


def unpacked(name: str, version: str, under: str, source: bool = True) -> Path:
    """The folder `under` of a release: of its source archive, or else of its wheel. Fetched once."""
    kept = CACHE / f"{name}-{version}"
    if not (kept / "complete").exists():
        kept.mkdir(parents=True, exist_ok=True)
        kind = ["--no-binary", ":all:"] if source else ["--only-binary", ":all:"]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *kind, "--dest", str(kept)]
        done = subprocess.run([*command, f"{name}=={version}"], capture_output=True, text=True)
        if done.returncode:
            raise NotFetchedError(f"{name} {version} cannot be fetched: {done.stderr.strip()[-300:]}")
        for archive in (*kept.glob("*.tar.gz"), *kept.glob("*.whl")):
            if archive.suffix == ".whl":
                with zipfile.ZipFile(archive) as wheel:
                    wheel.extractall(kept, [entry for entry in wheel.namelist() if entry.startswith(f"{under}/")])
            else:
                with tarfile.open(archive) as sources:
                    inside = [member for member in sources if member.name.partition("/")[2].startswith(f"{under}/")]
                    sources.extractall(kept, inside, filter="data")
            archive.unlink()
        (kept / "complete").touch()
    return next(kept.glob(f"*/{under}"), kept / under)
