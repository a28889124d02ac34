"""A bundle's manifest, read and checked before anything else: format, keys, and every file's size and hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Self

from arriero.errors import ArrieroError, MachineLacks, Problems
from arriero.runtimes.backend import ModelSpec
from arriero.runtimes.cpu import architecture, check_features

FORMAT = 3
KEYS = ("format", "arriero", "name", "model", "target", "record", "chain", "build", "files")
CHAIN = ("checkpoint", "graph", "profile", "artifact", "record", "parity")
REPORTS = ("parity.json", "parity.html")
RECORD_FOLDER = "reference"  # of the reference record, in a bundle that brings it
RECORD_FILE = f"{RECORD_FOLDER}/record.json"
FULL_HASH_BYTES = 1 << 30  # bundles up to here are hashed whole at every load: about a second
QUICK_HASH_BYTES = 64 << 20  # in larger bundles, only files up to here are

_COPY = "Copy the bundle again, or rebuild it with `arriero build`"


@dataclass(frozen=True)
class Target:
    """What the bundle was built for."""

    name: str
    backend: str
    profile: str
    context: int
    batch: int
    arch: str
    kv_cache: str
    features: tuple[str, ...] = ()  # of the processor, in Linux's names
    gpu: str | None = None  # the architecture that engines were compiled for: sm_89, ..
    plugins: dict[str, str] = field(default_factory=dict)  # name -> sha256 of the kernels compiled into the engines


@dataclass(frozen=True)
class FileRecord:
    """What the manifest says of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A manifest that was read and whose own shape is right; `raw` is its JSON as it stands."""

    bundle: Path
    name: str
    model: ModelSpec
    target: Target
    files: dict[str, FileRecord]
    raw: dict[str, Any]

    @classmethod
    def read(cls, bundle: Path) -> Self:
        """Read `bundle`/manifest.json; what is wrong with it is an `ArrieroError`."""
        path = bundle / "manifest.json"
        where = str(path)
        raw = _read_json(bundle, path)
        # the format comes first: another format may well lack keys, and that is not what is wrong with it
        if "format" in raw and raw["format"] != FORMAT:
            raise ArrieroError(
                f"the bundle has format {raw['format']!r}",
                where=where,
                expected=f"format {FORMAT}",
                remedy="Use the arriero that built it, or rebuild the bundle with this one",
            )
        missing = [key for key in KEYS if key not in raw]
        if missing:
            raise ArrieroError(f"keys are missing: {', '.join(missing)}", where=where, remedy=_COPY)
        return cls(
            bundle=bundle,
            name=str(raw["name"]),
            model=ModelSpec.parse(raw["model"], f"{where}:model"),
            target=_target(raw["target"], f"{where}:target"),
            files=_files(raw["files"], f"{where}:files"),
            raw=raw,
        )

    @property
    def tools(self) -> dict[str, str]:
        """The versions of the tools that made the bundle."""
        tools = self.raw.get("tools")
        return {str(name): str(version) for name, version in tools.items()} if isinstance(tools, Mapping) else {}

    def check_arch(self) -> None:
        """Refuse a bundle that was compiled for another kind of processor, or for one that can more."""
        here = architecture()
        if self.target.arch != "any" and architecture(self.target.arch) != here:
            raise MachineLacks(
                f"the bundle was built for {self.target.arch} and this machine is {here}",
                where=f"{self.bundle / 'manifest.json'}:target.arch",
                remedy="Build a target for this machine, or one with arch any",
            )
        check_features(self.target.features, f"{self.bundle / 'manifest.json'}:target.features")

    def check_chain(self) -> None:
        """Refuse a manifest that was edited, or put together from those of several builds."""
        where = f"{self.bundle / 'manifest.json'}:chain"
        chain, build = self.raw["chain"], self.raw["build"]
        if not isinstance(chain, Mapping) or not all(name in chain for name in CHAIN) or not isinstance(build, Mapping):
            raise ArrieroError("the hash chain is incomplete", where=where, expected=", ".join(CHAIN), remedy=_COPY)
        # The profile's own digest is not recorded; its link is held by the one after it.
        for before, name, digest, what in (
            ("checkpoint", "graph", str(build.get("graph")), "the graphs are not those of this checkpoint"),
            ("profile", "artifact", artifact_digest(self.raw), "the manifest or its file records were changed"),
            ("artifact", "record", str(self.raw["record"]), "the reference record is not that of this bundle"),
            ("record", "parity", parity_digest(self.raw["files"]), "the parity report is not that of this bundle"),
        ):
            if chain[name] != link(str(chain[before]), digest):
                raise ArrieroError(
                    f"the link {before} -> {name} is broken: {what}", where=f"{where}.{name}", remedy=_COPY
                )

        if RECORD_FILE in self.files and self.files[RECORD_FILE].sha256 != self.raw["record"]:
            raise ArrieroError("another reference record is in the bundle", where=f"{where}.record", remedy=_COPY)

    def check_proven(self) -> None:
        """Refuse a bundle without a parity report: its build is not finished."""
        if "parity.json" not in self.files:
            raise ArrieroError(
                "the bundle was not proven against its reference: its build did not finish",
                where=str(self.bundle),
                remedy="Run `arriero build` again and take the bundle that it publishes",
            )

    def check_files(self, full: bool | None = None) -> None:
        """Compare the files with their records; all differences are raised together.

        Sizes are always compared. Hashes are compared for all files when `full`, or when `full` is None and the
        bundle has at most `FULL_HASH_BYTES`; otherwise for files up to `QUICK_HASH_BYTES`.
        """
        if full is None:
            full = sum(record.bytes for record in self.files.values()) <= FULL_HASH_BYTES
        problems = []
        for name, record in self.files.items():
            path = self.bundle / name
            if not path.is_file():
                problems.append(ArrieroError("the file is missing from the bundle", where=name, remedy=_COPY))
            elif (size := path.stat().st_size) != record.bytes:
                problems.append(
                    ArrieroError(
                        f"the file has {size} bytes: it is incomplete or belongs to another build",
                        where=name,
                        expected=f"the {record.bytes} bytes that manifest.json records",
                        remedy=_COPY,
                    )
                )
            elif full or size <= QUICK_HASH_BYTES:
                found = file_sha256(path)
                if found != record.sha256:
                    problems.append(
                        ArrieroError(
                            f"the file's content was changed or damaged: sha256 {found[:12]}...",
                            where=name,
                            expected=f"{record.sha256[:12]}... that manifest.json records",
                            remedy=_COPY,
                        )
                    )
        if problems:
            raise Problems(f"{self.bundle}: the bundle's files do not match its manifest", problems)


def open_manifest(bundle: Path, full: bool | None = None) -> Manifest:
    """Read a bundle's manifest and check what it says: arch, hash chain, files (`full` as in `check_files`)."""
    manifest = Manifest.read(bundle)
    manifest.check_arch()
    manifest.check_chain()
    manifest.check_files(full)
    return manifest


def link(previous: str, digest: str) -> str:
    """Give the next link of the hash chain: what came before and what this step adds, both sha256 in hexadecimal."""
    return hashlib.sha256(f"{previous} {digest}".encode()).hexdigest()


def artifact_digest(manifest: Mapping[str, Any]) -> str:
    """Give the sha256 over everything a manifest says but its chain, its reference record and its parity reports."""
    said = {key: value for key, value in manifest.items() if key not in ("chain", "record")}
    said["files"] = {
        name: record
        for name, record in manifest["files"].items()
        if name not in REPORTS and not name.startswith(f"{RECORD_FOLDER}/")
    }
    # `build` also names the stages that made the record and the reports.
    proof = ("parity-", "reference")
    said["build"] = {name: key for name, key in manifest["build"].items() if not name.startswith(proof)}
    return _digest(said)


def parity_digest(files: Mapping[str, Mapping[str, Any]]) -> str:
    """Give the sha256 over the file records of the parity reports."""
    return _digest({name: files[name]["sha256"] for name in REPORTS if name in files})


def describe_fallback(entry: Mapping[str, Any]) -> str:
    """One entry of a manifest's `fallback` for people."""
    return f"layer {entry['layer']} expert {entry['expert']} ({entry['tokens']} tokens)"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Give the sha256 of a file's content in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(bundle: Path, path: Path) -> dict[str, Any]:
    if not bundle.is_dir():
        raise ArrieroError("there is no such bundle directory", where=str(bundle), remedy="Check the path")
    if not path.is_file():
        remedy = "Give a directory that `arriero build` published"
        if bundle.name.endswith(".partial"):
            remedy = "This build was not finished: run `arriero build` again"
        raise ArrieroError("the bundle has no manifest.json", where=str(bundle), remedy=remedy)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArrieroError(f"the manifest is not valid JSON ({error})", where=str(path), remedy=_COPY) from None
    if not isinstance(raw, dict):
        raise ArrieroError("the manifest is not a JSON object", where=str(path), remedy=_COPY)
    return raw


def _target(entry: Any, where: str) -> Target:
    try:
        target = Target(
            name=str(entry["name"]),
            backend=str(entry["backend"]),
            profile=str(entry["profile"]),
            context=int(entry["context"]),
            batch=int(entry["batch"]),
            arch=str(entry["arch"]),
            kv_cache=str(entry["kv_cache"]),
            features=tuple(map(str, entry.get("features") or ())),
            gpu=None if entry.get("gpu") is None else str(entry["gpu"]),
            plugins={str(name): str(digest) for name, digest in (entry.get("plugins") or {}).items()},
        )
    except KeyError as missing:
        raise ArrieroError(f"the key {missing} is missing", where=where, remedy=_COPY) from None
    except (TypeError, ValueError, AttributeError) as error:
        raise ArrieroError(f"an entry has the wrong shape ({error})", where=where, remedy=_COPY) from None
    if target.context < 1 or target.batch < 1:
        raise ArrieroError(
            f"context is {target.context} and batch {target.batch}", where=where, expected="at least 1", remedy=_COPY
        )
    return target


def _files(entries: Any, where: str) -> dict[str, FileRecord]:
    if not isinstance(entries, Mapping) or not entries:
        raise ArrieroError("no files are recorded", where=where, remedy=_COPY)
    files = {}
    for name, entry in entries.items():
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts:
            raise ArrieroError(f"{name!r} points outside the bundle", where=where, remedy=_COPY)
        try:
            files[name] = FileRecord(int(entry["bytes"]), str(entry["sha256"]))
        except (KeyError, TypeError, ValueError):
            raise ArrieroError(
                f"the record of {name} is malformed", where=where, expected="bytes and sha256", remedy=_COPY
            ) from None
    return files
