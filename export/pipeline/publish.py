"""Puts finished bundles under their names by renames, and replaces only what a build put there.

What is to be published is put together in `<name>.partial/new`, beside its place and marked as ours; the bundle that it
replaces waits in `<name>.partial/old` until the new one has its name. Where the place is a symbolic link, the folder
behind it is replaced and the link stays.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from arriero.errors import ArrieroError, Problems
from arriero.export.pipeline.ownership import MARK, PARTIAL, is_owned, may_own, own, remove_owned
from arriero.runtimes.manifest import FILE, FileRecord
from arriero.runtimes.proof.record import FILE as RECORD
from arriero.runtimes.typed_json import decode

NEW, OLD = "new", "old"
SHOWN = 3  # of the foreign files that an error names


class Publisher:
    """What appears in one output folder. `ledger`, if any, remembers which files were published, for damaged manifests.

    `suffix` is that of the folders in which it is put together.
    """

    def __init__(self, output: Path, ledger: Path | None = None, suffix: str = PARTIAL) -> None:
        self.output, self.ledger, self.suffix = output, ledger, suffix

    def prepare(self, final: Path, resumes: bool = False) -> Path:
        """A folder of ours in which what is to be `final` is put together: empty, or as it was left if it `resumes`."""
        staging = self.staging(final)
        own(staging)
        new = staging / NEW
        if new.exists() and not resumes:
            shutil.rmtree(new)
        new.mkdir(exist_ok=True)
        return new

    def staging(self, final: Path) -> Path:
        """The folder beside the place of `final` that holds all of this."""
        return self._staging(_place(final))

    def publish(self, final: Path) -> None:
        """Put what was prepared in the place of `final`; the old one goes afterwards.

        A kill in between leaves either the old or the new bundle, whole; the next `recover` finishes the change.
        Raises ArrieroError/Problems where the place holds what is not the bundle's.
        """
        if problems := self.problems(final):
            raise Problems("a bundle cannot be published", problems)
        place, staging = _place(final), self.staging(final)
        self._note(final, _files(staging / NEW))
        if place.exists():
            place.rename(staging / OLD)
        (staging / NEW).rename(place)
        sync(place.parent)
        remove_owned(staging)

    def problems(self, final: Path) -> list[ArrieroError]:
        """Why nothing can be published as `final`: what is in its place, or in that of its preparation, is not ours."""
        try:
            place = _place(final)
            reachable = place.parent.is_dir() or not final.is_symlink()
        except (OSError, RuntimeError):  # links in a circle
            reachable = False
        if not reachable:
            remedy = "Remove the link, or make the folder that it points into"
            return [ArrieroError("is a symbolic link to nowhere", where=str(final), remedy=remedy)]
        staging, problems = self._staging(place), []
        if not may_own(staging):
            what = "is where the bundle is put together, and no build made it"
            problems.append(ArrieroError(what, where=str(staging), remedy="Move it away, or rename the target"))
        remedy = "Choose another folder or name, or move it away"
        if place.exists() and not place.is_dir():
            problems.append(ArrieroError("is in the bundle's place and is no bundle", where=str(final), remedy=remedy))
        elif place.is_dir() and (there := _files(place)):
            listed = _listed(place)
            ours = self._published(final) | listed
            # a file that is called manifest.json and is none of ours may be anybody's
            known = there & (ours if listed else ours - {FILE, RECORD})
            foreign = sorted(there - ours)
            if not known:
                what = "is in the bundle's place and is no bundle"
                problems.append(ArrieroError(what, where=str(final), remedy=remedy))
            elif foreign:
                more = f" and {len(foreign) - SHOWN} more" if len(foreign) > SHOWN else ""
                what = f"holds files that are not the bundle's: {', '.join(foreign[:SHOWN])}{more}"
                remedy = "Move them away: the bundle is replaced as a whole"
                problems.append(ArrieroError(what, where=str(final), remedy=remedy))
        return problems

    def recover(self) -> None:
        """Finish what a killed `publish` began, wherever our mark says that it did."""
        for entry in sorted(self.output.iterdir()):
            try:
                staging = entry if entry.name.endswith(self.suffix) else self.staging(entry)
            except (OSError, RuntimeError):
                continue
            self._finish(staging)

    def recover_one(self, final: Path) -> None:
        """Finish what a killed `publish` of `final` began."""
        self._finish(self.staging(final))

    def prune(self, keep: Iterable[str]) -> None:
        """Delete what was prepared for names that are not in `keep`."""
        kept = {f"{name}{self.suffix}" for name in keep}
        for entry in self.output.iterdir():
            if entry.name.endswith(self.suffix) and entry.name not in kept and is_owned(entry):
                remove_owned(entry)

    def _published(self, final: Path) -> set[str]:
        return set(self._read().get(final.name, ()))

    def _note(self, final: Path, files: set[str]) -> None:
        if self.ledger is None:
            return
        known = self._read() | {final.name: sorted(files)}
        scratch = self.ledger.with_name(f"{self.ledger.name}{PARTIAL}")
        scratch.write_text(json.dumps(known, indent=1))
        scratch.replace(self.ledger)

    def _read(self) -> dict[str, list[str]]:
        if self.ledger is None:
            return {}
        try:
            known = json.loads(self.ledger.read_text())
        except (OSError, ValueError):  # then what is published says itself what it holds
            return {}
        return known if isinstance(known, dict) else {}

    def _finish(self, staging: Path) -> None:
        if not is_owned(staging):
            return
        place = staging.with_name(staging.name.removesuffix(self.suffix))
        if (staging / OLD).is_dir():
            # `publish` moved the old bundle away, so the new one was complete; only its rename may be missing.
            if not place.exists():
                (staging / (NEW if (staging / NEW).is_dir() else OLD)).rename(place)
        elif (staging / NEW).is_dir():
            return  # it was still being put together
        remove_owned(staging)

    def _staging(self, place: Path) -> Path:
        return place.with_name(f"{place.name}{self.suffix}")


def _place(final: Path) -> Path:
    return final.resolve() if final.is_symlink() else final


def _files(folder: Path) -> set[str]:
    """All that lies in a folder but its folders, relative to it."""
    entries = (entry for entry in folder.rglob("*") if entry.is_symlink() or not entry.is_dir())
    return {entry.relative_to(folder).as_posix() for entry in entries} - {MARK}


def _listed(place: Path) -> set[str]:
    """The files that a published bundle or record says it holds; none where nothing says so in our form."""
    for name in (FILE, RECORD):
        try:
            said = json.loads((place / name).read_text(encoding="utf-8"))
            files = decode(dict[str, FileRecord], said["files"], name, "")
        except (OSError, ValueError, KeyError, TypeError, RecursionError, ArrieroError):
            continue
        if "format" in said and files:
            return {name, *files}
    return set()


def sync(folder: Path) -> None:
    """Make renames in `folder` outlive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
