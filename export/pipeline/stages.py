"""Content-keyed stages: what was finished once is never done again, and what was killed leaves no half result.

A finished stage is the folder `<output>/.work/<name>-<key>`, which appears by one rename from `<name>-<key>.partial`.
Its key is a hash of everything the stage depends on, so that a folder that is there is the right one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arriero.errors import ArrieroError, MachineLacks
from arriero.export.machine.budget import PeakMemory
from arriero.runtimes.manifest import file_sha256

RECORD = "stage.json"
DOOMED = ".deleting-"
OLD = re.compile(r"(?P<final>.+)\.old-[0-9a-f]{8}")


@dataclass(frozen=True)
class Stage:
    """One step of a build: `run` fills the folder it is given; `key_inputs` (JSON values) decide what comes out.

    A stage that `resumes` is handed the folder of a killed run as it was left; another starts from an empty one.
    A stage that is `shared` has its files hard-linked into bundles. What damages a bundle damages it too, so its files
    are hashed when it is done and again before it is used.
    """

    name: str
    key_inputs: Mapping[str, Any]
    run: Callable[[Path], None]
    resumes: bool = False
    shared: bool = False

    @property
    def key(self) -> str:
        """Twelve hex digits of the hash of the inputs."""
        return key_of(self.name, self.key_inputs)


def key_of(name: str, key_inputs: Mapping[str, Any]) -> str:
    """Give the key of a stage with these inputs. Raises TypeError when they are not JSON values."""
    return hashlib.sha256(json.dumps([name, key_inputs], sort_keys=True).encode()).hexdigest()[:12]


class WorkDir:
    """The stages of one output folder, and the bundles published from them."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.root = output / ".work"

    @property
    def hash_memo(self) -> Path:
        """Where `Checkpoint.content_hash` remembers the hashes of unchanged files."""
        return self.root / "hashes.json"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the output folder for one build; first put right what a killed one left.

        Raises `ArrieroError` naming the process that holds it. The system frees the lock of a killed process.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = (self.root / "lock").open("a+")
        except OSError as error:
            remedy = "Choose another `output`, or change the folder's owner or mode"
            raise ArrieroError(f"cannot write here ({error.strerror})", where=str(self.output), remedy=remedy) from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                what = f"process {lock.read().strip() or 'unknown'} is building into this folder"
                remedy = "Wait until it ends, or choose another `output`"
                raise ArrieroError(
                    what, where=str(self.output), expected="one build at a time", remedy=remedy
                ) from None
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            self._recover()
            yield

    def folder(self, name: str, key: str) -> Path:
        """The folder of a finished stage, there or not."""
        return self.root / f"{name}-{key}"

    def is_done(self, name: str, key: str) -> bool:
        """Whether the stage is finished and every file it wrote still has its size."""
        folder = self.folder(name, key)
        try:
            files = read_record(folder)["files"]
            return all((folder / file).stat().st_size == record["bytes"] for file, record in files.items())
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def is_intact(self, name: str, key: str) -> bool:
        """Whether the stage is finished and every file it wrote has its size, and its content where that is hashed."""
        folder = self.folder(name, key)
        return self.is_done(name, key) and all(
            "sha256" not in record or file_sha256(folder / file) == record["sha256"]
            for file, record in read_record(folder)["files"].items()
        )

    def run_stage(self, stage: Stage) -> Path:
        """Give the stage's finished folder, running it if it is not there. Call it under `locked`.

        When `run` raises, the partial folder stays for the next try. A full disk or memory becomes `MachineLacks`.
        """
        final = self.folder(stage.name, stage.key)
        if self.is_intact(stage.name, stage.key):
            return final
        partial = final.with_name(f"{final.name}.partial")
        _remove(final)
        if not stage.resumes:
            _remove(partial)
        partial.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        with PeakMemory() as memory, _machine_limits(stage.name, self.output):
            stage.run(partial)
        record = {
            "name": stage.name,
            "key": stage.key,
            "inputs": stage.key_inputs,
            "seconds": round(time.monotonic() - start, 3),
            "peak_memory_bytes": memory.anonymous,
            "peak_resident_bytes": memory.resident,
            "files": _records(partial, stage.shared),
        }
        with (partial / RECORD).open("w") as file:
            json.dump(record, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(final)
        _sync(self.root)
        return final

    def publish(self, partial: Path, final: Path) -> None:
        """Put the finished folder `partial` (`<final>.partial`) in the place of `final`; the old one goes afterwards.

        A kill in between leaves either the old or the new bundle, whole; the next `locked` finishes the change.
        """
        old = final.with_name(f"{final.name}.old-{uuid.uuid4().hex[:8]}")
        if final.exists():
            final.rename(old)
        partial.rename(final)
        _sync(final.parent)
        _remove(old)

    def prune(self, keep: Iterable[tuple[str, str]]) -> None:
        """Delete the stage folders, partial ones too, whose (name, key) is not in `keep`."""
        kept = {self.folder(name, key).name for name, key in keep}
        for folder in self.root.iterdir():
            if re.fullmatch(r".+-[0-9a-f]{12}(\.partial)?", folder.name) and folder.name not in kept:
                _remove(folder)

    def _recover(self) -> None:
        for folder in (*self.output.glob(f"{DOOMED}*"), *self.root.glob(f"{DOOMED}*")):
            shutil.rmtree(folder)
        for old in sorted(self.output.glob("*.old-*")):
            match = OLD.fullmatch(old.name)
            if match is None:
                continue
            final = old.with_name(match.group("final"))
            partial = old.with_name(f"{final.name}.partial")
            # `publish` moved the old bundle away, so the partial one was complete; only the second rename is missing.
            if not final.exists():
                (partial if partial.exists() else old).rename(final)
            _remove(old)


def read_record(folder: Path) -> dict[str, Any]:
    """Read what a finished stage recorded: inputs, seconds, peak_memory_bytes, files with bytes and sha256."""
    record = json.loads((folder / RECORD).read_text())
    if not isinstance(record, dict):
        raise ValueError(f"{folder / RECORD} is no record")
    return record


@contextlib.contextmanager
def _machine_limits(name: str, output: Path) -> Iterator[None]:
    remedy = "Free some and run the same command again: the build goes on where it stopped"
    try:
        yield
    except MemoryError as error:
        raise MachineLacks(f"the memory ran out in stage {name}", expected="more free memory", remedy=remedy) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        what = f"the disk ran full in stage {name}"
        raise MachineLacks(what, where=str(output), expected="more free disk space", remedy=remedy) from error


def _records(folder: Path, hashed: bool) -> dict[str, dict[str, Any]]:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != RECORD)
    return {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size}
        | ({"sha256": file_sha256(file)} if hashed else {})
        for file in files
    }


def _sync(folder: Path) -> None:
    """Make renames in `folder` outlive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(folder: Path) -> None:
    """Delete a folder that may not exist, by first giving it a name that nobody takes for a result."""
    if folder.exists():
        renamed = folder.with_name(f"{DOOMED}{uuid.uuid4().hex[:8]}")
        folder.rename(renamed)
        shutil.rmtree(renamed)
