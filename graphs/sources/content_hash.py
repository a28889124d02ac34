"""The hash over a set of files, with the hashes of unchanged ones remembered."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path


def content_hash(files: Sequence[Path], memo: Path | None = None) -> str:
    """The sha256 over all `files`; per-file hashes are remembered in `memo` by path, size, time of change and inode."""
    known = _read_memo(memo)
    hashes: dict[str, str] = {}
    for file in files:
        key = _memo_key(file)
        if key not in known:
            known = {old: value for old, value in known.items() if not old.startswith(f"{file.absolute()}|")}
            with file.open("rb") as stream:
                known[key] = hashlib.file_digest(stream, "sha256").hexdigest()
            if memo:
                _write_memo(memo, known)
        hashes[file.name] = known[key]
    return _combine(hashes)


def known_content_hash(files: Sequence[Path], memo: Path) -> str | None:
    """`content_hash` when `memo` holds every file as it is now, else None; reads no tensor, writes nothing."""
    known = _read_memo(memo)
    keys = {file.name: _memo_key(file) for file in files}
    if not all(key in known for key in keys.values()):
        return None
    return _combine({name: known[key] for name, key in keys.items()})


def _combine(hashes: dict[str, str]) -> str:
    return hashlib.sha256("".join(f"{name} {hashes[name]}\n" for name in sorted(hashes)).encode()).hexdigest()


def _memo_key(file: Path) -> str:
    stat = file.stat()
    # the inode too: images of containers give every file one time
    return f"{file.absolute()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}"


def _read_memo(memo: Path | None) -> dict[str, str]:
    """Read the memo; a broken one is as good as none, it only costs hashing again."""
    try:
        known = json.loads(memo.read_text()) if memo else {}
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write_memo(memo: Path, known: dict[str, str]) -> None:
    memo.parent.mkdir(parents=True, exist_ok=True)
    partial = memo.with_name(f"{memo.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(known, indent=1))
    partial.replace(memo)
