"""Content-keyed stages: what was finished once is never done again, and what was killed leaves no half result.

A finished stage is the folder `<output>/.work/<name>-<key>`, which appears by one rename from `<name>-<key>.partial`.
Its key is a hash of everything the stage depends on. What it wrote is hashed when it is done, and again before use.
Stages that other output folders can use as they are, are taken from and put into the user's cache (`kept_stages.py`).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arriero.errors import ArrieroError, MachineLacks, is_full
from arriero.export.compile import Watch, no_watch
from arriero.export.machine.memory_watch import MemoryWatch, release_memory
from arriero.export.pipeline.kept_stages import KeptStages
from arriero.export.pipeline.ownership import MARK, PARTIAL, is_owned, own, remove_owned
from arriero.export.pipeline.publish import Publisher, sync
from arriero.profiles.journal import Tell, keep_silent
from arriero.runtimes.broken_package import naming_broken_packages
from arriero.runtimes.manifest import FileRecord, file_sha256

RECORD = "stage.json"
LOCK = "lock"  # in a work folder; it says which process holds it
Run = Callable[[Path], Iterable[str] | None]  # fills a folder and says which files it wrote; None for all
WITH = "+"  # between a stage's name and the adapter that it is done with
WORTH_TELLING = 1 << 28  # bytes; what is less is hashed in a second
FOLDER = re.compile(r"(?P<name>.+)-(?P<key>[0-9a-f]{12})(\.partial)?")


@dataclass(frozen=True)
class Stage:
    """One step of a build: `run` fills the folder it is given; `key_inputs` (JSON values) decide what comes out.

    `run` gives the names of the files that it wrote, relative to the folder; whatever else lies there is dropped. None
    stands for all of them, for a stage that starts from an empty folder. One that `resumes` is handed the folder of a
    killed run as it was left. One that is `shared` says nothing of where it was made, so that any build may use it.
    """

    name: str
    key_inputs: Mapping[str, Any]
    run: Run
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

    def __init__(
        self, output: Path, memory: int | None = None, watch: Watch = no_watch, tell: Tell = keep_silent
    ) -> None:
        """Take the stages in `output`; `memory` is what one may hold at most while it runs, in bytes.

        `watch` sees how much of a stage's files is hashed, `tell` is given a sentence for what was finished and has to
        be made again.
        """
        self.output, self.memory, self.watch, self.tell = output, memory, watch, tell
        self.root = output / ".work"
        self.ran: dict[str, float] = {}  # the seconds of each stage that this process ran or took from another build
        self.kept = KeptStages.of_user()
        self.bundles = Publisher(output, self.root / "published.json")

    @property
    def hash_memo(self) -> Path:
        """Where `Checkpoint.content_hash` remembers the hashes of unchanged files."""
        return self.root / "hashes.jsonl"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the output folder for one build; first put right what a killed one left.

        Raises `ArrieroError` naming the process that holds it. The system frees the lock of a killed process.
        """
        try:
            own(self.root)
            lock = (self.root / LOCK).open("a+")
        except OSError as error:
            if is_full(error):
                raise
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
            self.bundles.recover()
            yield

    def folder(self, name: str, key: str) -> Path:
        """The folder of a finished stage, there or not."""
        return self.root / f"{name}-{key}"

    def is_done(self, name: str, key: str) -> bool:
        """Whether the stage is finished and every file it wrote still has its size."""
        return _first_resized(self.folder(name, key)) is None

    def is_intact(self, name: str, key: str) -> bool:
        """Whether the stage is finished and every file it wrote has the content that it was given."""
        return self._first_changed(name, self.folder(name, key)) is None

    def partial(self, name: str, key: str) -> Path:
        """The folder in which a stage is made, marked as ours."""
        folder = self._unfinished(name, key)
        own(folder)
        return folder

    def _unfinished(self, name: str, key: str) -> Path:
        folder = self.folder(name, key)
        return folder.with_name(f"{folder.name}{PARTIAL}")

    def run_stage(self, stage: Stage) -> Path:
        """Give the stage's finished folder, running it if it is not there. Call it under `locked`.

        When `run` raises, the partial folder stays for the next try. A full disk or memory becomes `MachineLacks`;
        a stage that holds more than the build's `memory` is stopped with `ArrieroError`.
        """
        final = self.folder(stage.name, stage.key)
        if self._is_usable(stage.name, final):
            return final
        partial = self._unfinished(stage.name, stage.key)
        remove_owned(final, RECORD)
        with machine_limits(f"in stage {stage.name}", self.output):
            # With its record a stage is complete: what a kill leaves after that is only cleaned and named.
            start, borrowed = time.monotonic(), False
            if not (is_owned(partial) and self._is_usable(stage.name, partial)):
                borrowed = self._borrow(stage, partial)
                if not borrowed:
                    self._write_stage(stage, partial)
            record = read_record(partial)
            _drop_others(partial, record["files"])
            partial.rename(final)
        sync(self.root)
        self.ran[stage.name] = round(time.monotonic() - start, 3) if borrowed else record["seconds"]
        if stage.shared and not borrowed:
            self.kept.keep(final)
        return final

    def _borrow(self, stage: Stage, partial: Path) -> bool:
        """Take over what another build made of a shared stage; whether there is such, whole."""
        if not (stage.shared and self.kept.holds(stage.name, stage.key)):
            return False
        remove_owned(partial)
        own(partial)
        if not (self.kept.lend(stage.name, stage.key, partial) and self._is_usable(stage.name, partial)):
            return False
        self.watch(f"{stage.name}: as an earlier build made it", 1, 1, "stages")
        return True

    def _write_stage(self, stage: Stage, partial: Path) -> None:
        """Run the stage in its partial folder and write its record there, over the files that it says it wrote."""
        if not stage.resumes:
            remove_owned(partial)
        own(partial)
        (partial / RECORD).unlink(missing_ok=True)
        release_memory()
        start, worked = time.monotonic(), processor_seconds()
        with MemoryWatch(self.memory, f"stage {stage.name}") as memory:
            names = stage.run(partial)
        record = {
            "name": stage.name,
            "key": stage.key,
            "inputs": stage.key_inputs,
            "seconds": round(time.monotonic() - start, 3),
            "processor_seconds": round(processor_seconds() - worked, 3),
            "start_memory_bytes": memory.start,
            "peak_memory_bytes": memory.peak,
            "peak_resident_bytes": memory.resident,
            "files": {
                file.relative_to(partial).as_posix(): FileRecord.of(file).entry()
                for file in self._telling(f"{stage.name}: hash files", _files(partial, names))
            },
        }
        scratch = partial / f"{RECORD}.partial"
        with scratch.open("w") as file:
            json.dump(record, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(partial / RECORD)

    def _is_usable(self, name: str, folder: Path) -> bool:
        """Whether the stage `name` in `folder` is finished and intact; one that was finished and is not is told."""
        changed = self._first_changed(name, folder)
        if changed is not None and (folder / RECORD).is_file():
            self.tell(f"{changed}: stage {name} left it otherwise; the stage is made again")
        return changed is None

    def _first_changed(self, name: str, folder: Path) -> Path | None:
        """The first file of the stage `name` in `folder` without the content that the record says; the record itself
        where there is none.
        """
        changed = _first_resized(folder)
        if changed is None:
            hashes = {folder / file: entry.get("sha256") for file, entry in read_record(folder)["files"].items()}
            files = self._telling(f"{name}: check files", [*hashes])
            changed = next((file for file in files if file_sha256(file) != hashes[file]), None)
        return changed

    def _telling(self, step: str, files: Sequence[Path]) -> Iterator[Path]:
        """`files` in turn, and to the watcher how much of them is behind."""
        sizes = [file.stat().st_size for file in files]
        total, done = sum(sizes), 0
        for file, size in zip(files, sizes, strict=True):
            if total >= WORTH_TELLING:
                self.watch(step, done, total, "bytes")
            yield file
            done += size

    def prune(self, keep: Iterable[tuple[str, str]]) -> None:
        """Delete the stage folders that builds made, partial ones too, whose (name, key) is not in `keep`."""
        kept = {self.folder(name, key).name + suffix for name, key in keep for suffix in ("", PARTIAL)}
        for folder in self.root.iterdir():
            if FOLDER.fullmatch(folder.name) and folder.name not in kept and is_owned(folder):
                remove_owned(folder, RECORD)


def processor_seconds() -> float:
    """What this process and the programs that it ran have used of processors so far."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def read_record(folder: Path) -> dict[str, Any]:
    """Read what a finished stage recorded: inputs, seconds, peak_memory_bytes, files with bytes and sha256."""
    record = json.loads((folder / RECORD).read_text())
    if not isinstance(record, dict):
        raise ValueError(f"{folder / RECORD} is no record")
    return record


def subject_stage(stage: str, adapter: str | None) -> str:
    """The stage that does for the model with `adapter` what `stage` does for the model itself."""
    return stage if adapter is None else f"{stage}{WITH}{adapter}"


def split_stage(name: str) -> tuple[str, str | None]:
    """The inverse of `subject_stage`."""
    stage, _, adapter = name.partition(WITH)
    return stage, adapter or None


@contextlib.contextmanager
def machine_limits(doing: str, output: Path) -> Iterator[None]:
    """Within the block, a full disk or memory becomes `MachineLacks` that says it happened while `doing` something, and
    so does a package that does not load.
    """
    remedy = "Free some and run the same command again: the build goes on where it stopped"
    try:
        with naming_broken_packages():
            yield
    except MemoryError as error:
        raise MachineLacks(f"the memory ran out {doing}", expected="more free memory", remedy=remedy) from error
    except OSError as error:
        if not is_full(error):
            raise
        what = f"the disk ran full {doing}"
        raise MachineLacks(what, where=str(output), expected="more free disk space", remedy=remedy) from error


def _first_resized(folder: Path) -> Path | None:
    """The first file of a finished stage without the size that the record says; the record where there is none."""
    at = folder / RECORD
    try:
        for file, entry in read_record(folder)["files"].items():
            at = folder / file
            if at.stat().st_size != entry["bytes"]:
                return at
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return at
    return None


def _drop_others(folder: Path, names: Iterable[str]) -> None:
    """Delete what is in a stage's folder beside the files `names` that it recorded."""
    kept = {folder / name for name in (*names, RECORD, MARK)}
    folders = {parent for path in kept for parent in path.parents}
    for entry in [*folder.rglob("*")]:
        if not entry.exists() or entry in kept or entry in folders:
            continue
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _files(folder: Path, names: Iterable[str] | None) -> list[Path]:
    """The files `names`, or all that are there, sorted. Raises FileNotFoundError for missing ones."""
    there = {file for file in folder.rglob("*") if file.is_file() and file not in (folder / RECORD, folder / MARK)}
    files = sorted(there if names is None else {folder / name for name in names})
    missing = [str(file) for file in files if file not in there]
    if missing:
        raise FileNotFoundError(f"the stage says it wrote {', '.join(missing)}")
    return files
