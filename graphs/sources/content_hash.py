"""The hash over a set of files, with the hashes of unchanged ones remembered.

It is the one time that a build reads every byte of a checkpoint, so the weights are checked on the way.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import IO

from arriero.errors import ArrieroError, Problems
from arriero.graphs.sources.finite import first_nonfinite, not_finite
from arriero.graphs.sources.weight_source import WeightSource
from arriero.profiles.sealed_line import opened, sealed

BLOCK = 1 << 24  # bytes, a multiple of every dtype's size


@dataclass(frozen=True)
class FileState:
    """What the file system says of a file without reading it; times in nanoseconds."""

    size: int
    modified: int
    inode: int
    changed: int
    links: int

    @classmethod
    def of(cls, file: Path) -> FileState:
        """The state of `file` now."""
        stat = file.stat()
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_ctime_ns, stat.st_nlink)

    def has_bytes_of(self, earlier: FileState) -> bool:
        """Whether nothing was written since `earlier`.

        The inode has to be the same too: images of containers give every file one time. So has the time of the last
        change, which no tool sets back. A hard link, as bundles have to a checkpoint's files, changes that time as
        well, and the number of links.
        """
        same = (self.size, self.modified, self.inode) == (earlier.size, earlier.modified, earlier.inode)
        return same and (self.changed == earlier.changed or self.links != earlier.links)


@dataclass(frozen=True)
class KnownFile:
    """A file's hash, its state at that time, and where the tensors begin that were checked as it was read."""

    state: FileState
    sha256: str
    checked: frozenset[int]


def content_hash(
    files: Sequence[Path],
    memo: Path | None = None,
    weights: Iterable[WeightSource] = (),
    texts: Mapping[str, str] = MappingProxyType({}),
    progress: Callable[[int, int], None] | None = None,
) -> str:
    """The sha256 over all `files`; that of each is remembered in `memo` for as long as nothing is written to it.

    `texts` are those of files that the checkpoint would have, by name. `progress(bytes_done, bytes_total)` counts what
    has to be read.

    Raises `Problems` for values of `weights` that are NaN or infinite, in the files that hold any that was not checked
    before.
    """
    placed: dict[Path, dict[int, WeightSource]] = {}
    for source in weights:
        if source.place is not None and source.nbytes:
            placed.setdefault(source.place.file, {})[source.place.offset] = source
    known = _read_memo(memo)
    states = {file: FileState.of(file) for file in files}
    unchanged = {
        file: last
        for file, state in states.items()
        if (last := known.get(str(file.absolute()))) is not None and state.has_bytes_of(last.state)
    }
    whole = {file for file, last in unchanged.items() if placed.get(file, {}).keys() <= last.checked}
    total, done = sum(state.size for file, state in states.items() if file not in whole), 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress:
            progress(done, total)

    if total:
        count(0)
    for file, state in states.items():
        path, inside = str(file.absolute()), placed.get(file, {})
        before = known.get(path)
        if file in whole:
            known[path] = replace(unchanged[file], state=state)
        else:
            checked = inside.keys() | (unchanged[file].checked if file in unchanged else frozenset())
            known[path] = KnownFile(state, _hash_file(file, inside, count), frozenset(checked))
        if memo and known[path] != before:
            _write_memo(memo, known)
    return _combine([(file.name, known[str(file.absolute())].sha256) for file in files], texts)


def _hash_file(file: Path, weights: Mapping[int, WeightSource], count: Callable[[int], None]) -> str:
    digest, problems, at = hashlib.sha256(), [], 0

    def take(block: bytes) -> None:
        digest.update(block)
        count(len(block))

    with file.open("rb") as stream:
        for offset, source in sorted(weights.items()):
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
    known = _unchanged(files, memo)
    return None if len(known) < len(files) else _combine([(file.name, known[file].sha256) for file in files], texts)


def is_damaged(memo: Path) -> bool:
    """Whether there is a `memo`, and nothing in it can be used."""
    return memo.exists() and not _read_memo(memo)


def remember_links(files: Sequence[Path], memo: Path) -> None:
    """Remember that `files` have the bytes that they had, after a build that may have linked them."""
    known = _read_memo(memo)
    unchanged = _unchanged(files, memo)
    now = known | {str(file.absolute()): replace(last, state=FileState.of(file)) for file, last in unchanged.items()}
    if now != known:
        _write_memo(memo, now)


def _unchanged(files: Sequence[Path], memo: Path) -> dict[Path, KnownFile]:
    """What `memo` knows of those of `files` that nothing was written to since."""
    known = _read_memo(memo)
    held = {file: known[path] for file in files if (path := str(file.absolute())) in known}
    return {file: last for file, last in held.items() if FileState.of(file).has_bytes_of(last.state)}


def _combine(hashes: Sequence[tuple[str, str]], texts: Mapping[str, str]) -> str:
    """The hash of files by name; those of one name, which lie in different folders, stay in their order."""
    made = [(name, hashlib.sha256(text.encode()).hexdigest()) for name, text in texts.items()]
    lines = (f"{name} {value}\n" for name, value in sorted([*hashes, *made], key=lambda pair: pair[0]))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _read_memo(memo: Path | None) -> dict[str, KnownFile]:
    """The memo's files by absolute path; a broken or changed one is as good as none, it only costs hashing again.

    It is one sealed line.
    """
    if memo is None:
        return {}
    try:
        entries = opened(memo.read_bytes())
        if entries is None:
            return {}
        return {
            path: KnownFile(FileState(*entry["state"]), entry["sha256"], frozenset(entry["checked"]))
            for path, entry in json.loads(entries).items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _write_memo(memo: Path, known: Mapping[str, KnownFile]) -> None:
    held = {
        path: {"state": astuple(last.state), "sha256": last.sha256, "checked": sorted(last.checked)}
        for path, last in known.items()
    }
    memo.parent.mkdir(parents=True, exist_ok=True)
    # in place: half of it is as good as none, and nothing lies beside it
    memo.write_bytes(sealed(json.dumps(held).encode()))
