"""Bundles of random files in chunks of 4 KiB, and stores that count what is asked of them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from arriero.export.store.objects import FolderStore, ObjectStore, UrlStore
from arriero.export.store.pull import Pulled, pull_bundle
from arriero.export.store.push import Pushed, push_bundle
from arriero.runtimes import manifest
from arriero.runtimes.manifest import REPORTS, FileRecord
from tests.runtimes.conftest import write_manifest

CHUNK = 4096


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "CHUNK_BYTES", CHUNK)


def record_files(folder: Path, backend: str | None = None) -> None:
    """Write the manifest that fits the files in `folder`; for None of the backend that it had."""
    manifest = folder / "manifest.json"
    if backend is None:
        backend = json.loads(manifest.read_text())["target"]["backend"]
    manifest.unlink(missing_ok=True)
    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    records = {name: FileRecord.of(file).entry() for name, file in files.items()}
    target = write_manifest(folder)["target"] | {"backend": backend}
    write_manifest(folder, files=json.loads(json.dumps(records)), target=target)


def make_bundle(folder: Path, backend: str = "tvm") -> Path:
    """Core weights of six chunks, experts of five and a bit, small files, an empty one, reports."""
    draw = random.Random(7)
    for name, size in {
        "weights/core.safetensors": 6 * CHUNK,
        "weights/experts.safetensors": 5 * CHUNK + 100,
        "text.json": 900,
        "tokenizer/empty": 0,
        **dict.fromkeys(REPORTS, 50),
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(draw.randbytes(size))
    record_files(folder, backend)
    return folder


def change_chunk(bundle: Path, name: str, number: int) -> None:
    """Change one byte of a chunk of a file, and record it."""
    content = bytearray((bundle / name).read_bytes())
    content[number * CHUNK] ^= 1
    (bundle / name).write_bytes(content)
    record_files(bundle)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "built" / "edge")


@pytest.fixture(params=["folder", "file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ObjectStore]:
    """Our own folder, and fsspec's local and memory file systems."""
    if request.param == "memory":
        fsspec.filesystem("memory").store.clear()
        yield UrlStore("memory://models")
        fsspec.filesystem("memory").store.clear()
    else:
        yield FolderStore(tmp_path / "store") if request.param == "folder" else UrlStore(f"file://{tmp_path}/store")


class Counted:
    """A store, the chunks that were read from it and those that were written to it; `fails_after` so many of either."""

    def __init__(self, store: ObjectStore, fails_after: int | None = None) -> None:
        self.store, self.left = store, fails_after
        self.read_chunks: list[str] = []
        self.written_chunks: list[str] = []

    def _count(self, chunks: list[str], name: str) -> None:
        if name.startswith("chunks/"):
            if self.left is not None and len(chunks) >= self.left:
                raise ConnectionError("the line is cut")
            chunks.append(name)

    def read(self, name: str, most: int) -> bytes:
        self._count(self.read_chunks, name)
        return self.store.read(name, most)

    def write(self, name: str, content: bytes) -> None:
        self._count(self.written_chunks, name)
        self.store.write(name, content)

    def size(self, name: str) -> int | None:
        return self.store.size(name)

    def names(self, folder: str) -> list[str]:
        return self.store.names(folder)

    def place(self, name: str) -> str:
        return self.store.place(name)


def watch(step: str, done: int, total: int, unit: str) -> None:
    assert 0 <= done <= total
    assert unit == "bytes"


def push(bundle: Path, store: ObjectStore, name: str | None = None) -> Pushed:
    return push_bundle(bundle, store, watch, name)


def take(store: ObjectStore, folder: Path, **options: Any) -> Pulled:
    return pull_bundle(store, folder, watch, **options)
