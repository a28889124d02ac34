"""The hash over a set of files, with the hashes of unchanged ones remembered.

It is the one time that a build reads every byte of a checkpoint, so the weights are checked on the way.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import IO

from arriero.errors import ArrieroError, Problems
from arriero.graphs.sources.finite import first_nonfinite, not_finite
from arriero.graphs.sources.weight_source import WeightSource

BLOCK = 1 << 24  # bytes, a multiple of every dtype's size


def content_hash(
    files: Sequence[Path],
    memo: Path | None = None,
    weights: Iterable[WeightSource] = (),
    texts: Mapping[str, str] = MappingProxyType({}),
    progress: Callable[[int, int], None] | None = None,
) -> str:
    """The sha256 over all `files`; those of each are remembered in `memo` by path, size, time of change and inode.

    `texts` are those of files that the checkpoint would have, by name. `progress(bytes_done, bytes_total)` counts what
    has to be read.

    Raises `Problems` for values of `weights` that are NaN or infinite, in the files that it does not remember.
    """
    placed: dict[Path, list[tuple[int, WeightSource]]] = {}
    for source in weights:
        if source.place is not None:
            placed.setdefault(source.place.file, []).append((source.place.offset, source))
    known = _read_memo(memo)
    total, done = sum(file.stat().st_size for file in files if _memo_key(file) not in known), 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress:
            progress(done, total)

    if total:
        count(0)
    hashes: list[tuple[str, str]] = []
    for file in files:
        key = _memo_key(file)
        if key not in known:
            known = {old: value for old, value in known.items() if not old.startswith(f"{file.absolute()}|")}
            known[key] = _hash_file(file, placed.get(file, []), count)
            if memo:
                _write_memo(memo, known)
        hashes.append((file.name, known[key]))
    return _combine(hashes, texts)


def _hash_file(file: Path, weights: list[tuple[int, WeightSource]], count: Callable[[int], None]) -> str:
    digest, problems, at = hashlib.sha256(), [], 0

    def take(block: bytes) -> None:
        digest.update(block)
        count(len(block))

    with file.open("rb") as stream:
        for offset, source in sorted(weights, key=lambda weight: weight[0]):
            for block in _blocks(stream, offset - at):
                take(block)
            seen, problem = 0, None
            for block in _blocks(stream, source.nbytes):
                take(block)
                if problem is None and (number := first_nonfinite(block, source.dtype)) is not None:
                    problem = not_finite(source, seen * math.prod(source.shape) // source.nbytes + number)
                seen += len(block)
            problems += [problem] if problem else []
            at = offset + source.nbytes
        while block := stream.read(BLOCK):
            take(block)
    if problems:
        raise Problems(f"the weights in {file} are broken", problems)
    return digest.hexdigest()


def _blocks(stream: IO[bytes], count: int) -> Iterator[bytes]:
    """The next `count` bytes of `stream`. Raises ArrieroError where it ends before."""
    while count > 0:
        block = stream.read(min(BLOCK, count))
        if not block:
            raise ArrieroError("the file was cut short while it was read", where=stream.name, remedy="Start again")
        count -= len(block)
        yield block


def known_content_hash(
    files: Sequence[Path], memo: Path, texts: Mapping[str, str] = MappingProxyType({})
) -> str | None:
    """`content_hash` when `memo` holds every file as it is now, else None; reads no tensor, writes nothing."""
    known = _read_memo(memo)
    keys = [(file.name, _memo_key(file)) for file in files]
    if not all(key in known for _, key in keys):
        return None
    return _combine([(name, known[key]) for name, key in keys], texts)


def _combine(hashes: Sequence[tuple[str, str]], texts: Mapping[str, str]) -> str:
    """The hash of files by name; those of one name, which lie in different folders, stay in their order."""
    made = [(name, hashlib.sha256(text.encode()).hexdigest()) for name, text in texts.items()]
    lines = (f"{name} {value}\n" for name, value in sorted([*hashes, *made], key=lambda pair: pair[0]))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


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
    memo.write_text(json.dumps(known, indent=1))  # in place: half of it is as good as none, and nothing lies beside it
