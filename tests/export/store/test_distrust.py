"""Nothing in a store is trusted: what is damaged, hostile or somebody's own is named, and nothing of it appears."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from arriero.errors import ArrieroError, MachineLacks
from arriero.export.store.layout import chunk
from arriero.export.store.list_bundles import list_bundles
from arriero.export.store.objects import FolderStore, ObjectStore, open_store
from arriero.runtimes.manifest import Manifest
from tests.command import contents
from tests.export.store.conftest import CHUNK, Counted, change_chunk, push, take
from tests.runtimes.conftest import seal


@pytest.mark.parametrize("damage", ["flipped", "short", "gone", "a folder"])
def test_a_damaged_chunk_is_named_and_the_rest_arrives(bundle: Path, tmp_path: Path, damage: str) -> None:
    store = FolderStore(tmp_path / "store")
    push(bundle, store)
    record = Manifest.read(bundle).files["weights/core.safetensors"]
    path = tmp_path / "store" / "chunks" / record.chunks[1]
    whole = path.read_bytes()
    if damage == "flipped":
        path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    elif damage == "short":
        path.write_bytes(whole[:-1])
    else:
        path.unlink()
        if damage == "a folder":
            path.mkdir()
    says = "is not in the store" if damage in ("gone", "a folder") else "it was changed or damaged; expected the 4096"
    with pytest.raises(ArrieroError, match=rf"chunks/{path.name}: .*{says}") as caught:
        take(store, tmp_path / "edge")
    assert caught.value.exit_code == 2
    assert not (tmp_path / "edge").exists()
    if damage == "a folder":
        path.rmdir()
    elif damage == "flipped":  # of its own size: what the error says to do
        path.unlink()
    assert push(bundle, store).sent_chunks == 1
    counted = Counted(store)
    take(counted, tmp_path / "edge")
    assert contents(tmp_path / "edge") == contents(bundle)
    if damage in ("flipped", "short"):
        assert counted.read_chunks == [chunk(path.name)]


def test_all_damaged_chunks_are_named_at_once(bundle: Path, tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    push(bundle, store)
    for digest in Manifest.read(bundle).files["weights/core.safetensors"].chunks[:2]:
        (tmp_path / "store" / "chunks" / digest).write_bytes(bytes(CHUNK))
    with pytest.raises(ArrieroError, match="2 problems"):
        take(store, tmp_path / "edge")


def test_a_damaged_bundle_is_not_pushed(bundle: Path, store: ObjectStore) -> None:
    core = bundle / "weights" / "core.safetensors"
    core.write_bytes(bytes(6 * CHUNK))
    with pytest.raises(ArrieroError, match=r"core\.safetensors: the file's content was changed"):
        push(bundle, store)
    core.write_bytes(bytes(5 * CHUNK))
    with pytest.raises(ArrieroError, match=r"core\.safetensors: the file has 20480 bytes"):
        push(bundle, store)
    assert list_bundles(store) == []


def test_damage_in_a_large_file_is_noticed_on_the_way(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quick look at the bundle does not read large files."""
    monkeypatch.setattr("arriero.runtimes.integrity.QUICK_HASH_BYTES", CHUNK)
    core = bundle / "weights" / "core.safetensors"
    core.write_bytes(core.read_bytes()[: 3 * CHUNK] + bytes(3 * CHUNK))
    store = FolderStore(tmp_path / "store")
    with pytest.raises(ArrieroError, match=r"3 problems\n.*core\.safetensors: .*damaged, from byte 12288 on"):
        push(bundle, store)
    assert list_bundles(store) == []


def hostile(store: FolderStore, bundle: Path, change: Any) -> None:
    """Put a version into the store whose manifest is changed and named by its hash all the same."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest)
    content = json.dumps(manifest).encode()
    version = hashlib.sha256(content).hexdigest()
    store.write(f"bundles/edge/{version}.json", content)
    store.write("bundles/edge/latest", version.encode())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda files: files.update({"../x": files["text.json"]}), "points outside the bundle"),
        (lambda files: files.update({"/etc/x": files["text.json"]}), "points outside the bundle"),
        (lambda files: files.update({"a//b": files["text.json"]}), "'a//b' is no file of a bundle"),
        (lambda files: files.update({"./a": files["text.json"]}), "is no file of a bundle"),
        (lambda files: files.update({"": files["text.json"]}), "is no file of a bundle"),
        (lambda files: files.update({"a\n": files["text.json"]}), "is no file of a bundle"),
        (lambda files: files.update({"manifest.json": files["text.json"]}), "is no file of a bundle"),
        (lambda files: files.update({"weights": files["text.json"]}), "'weights' is no file of a bundle"),
        (lambda files: files["text.json"].update(sha256="../../latest"), r"files\.text\.json: .* no sha256"),
        (lambda files: files["text.json"].update(sha256="A" * 64), "no sha256 in hexadecimal"),
        (lambda files: files["text.json"].update(bytes=-1), "it has -1 bytes"),
        (lambda files: files["text.json"].update(bytes=CHUNK + 1), "0 chunks are hashed where it has 2"),
        (lambda files: files["text.json"].update(chunks=["0" * 64]), "1 chunks are hashed where it has 0"),
        (lambda files: files["weights/core.safetensors"].update(bytes=1 << 60), "6 chunks are hashed where it has 2"),
        (lambda files: files["weights/core.safetensors"].update(bytes=5 * CHUNK + 1), "the link .* is broken"),
        (lambda files: files.clear(), "no files are recorded"),
    ],
)
def test_a_hostile_manifest_is_refused(bundle: Path, tmp_path: Path, change: Any, sentence: str) -> None:
    store = FolderStore(tmp_path / "store")
    push(bundle, store)
    hostile(store, bundle, lambda manifest: change(manifest["files"]))
    with pytest.raises(ArrieroError, match=sentence) as caught:
        take(store, tmp_path / "device" / "edge")
    assert str(tmp_path / "store") in str(caught.value)
    assert not (tmp_path / "device").exists()
    assert list_bundles(store)[0].problem is not None


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("latest", b"../../../etc/passwd", r"latest: says '\.\./\.\./\.\./etc/passwd'; expected the sha256"),
        ("latest", b"", "latest: says ''"),
        ("latest", b"\xff" * 10_000, "latest: says"),
        ("VERSION.json", b"{", r"the manifest was changed or damaged: sha256 .*Push the bundle again"),
    ],
)
def test_a_damaged_pointer_or_manifest_is_refused(
    bundle: Path, store: ObjectStore, tmp_path: Path, name: str, content: bytes, sentence: str
) -> None:
    version = push(bundle, store).version
    store.write(f"bundles/edge/{name.replace('VERSION', version)}", content)
    with pytest.raises(ArrieroError, match=sentence):
        take(store, tmp_path / "edge")
    push(bundle, store)
    take(store, tmp_path / "edge")


@pytest.mark.parametrize("content", [b"[]", b"nonsense", b'{"format": 3}'])
def test_a_manifest_that_is_none_is_refused(store: ObjectStore, tmp_path: Path, content: bytes) -> None:
    version = hashlib.sha256(content).hexdigest()
    store.write(f"bundles/edge/{version}.json", content)
    store.write("bundles/edge/latest", version.encode())
    with pytest.raises(ArrieroError, match=f"{version}.json"):
        take(store, tmp_path / "edge")


def test_chunks_that_make_another_file_are_refused(bundle: Path, tmp_path: Path) -> None:
    """Each chunk is what its name says, and the file is not: the manifest contradicts itself."""
    core = Manifest.read(bundle).files["weights/core.safetensors"]
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"]["weights/core.safetensors"]["sha256"] = "0" * 64
    seal(manifest)
    store = FolderStore(tmp_path / "store")
    push(bundle, store)
    hostile(store, bundle, lambda entries: entries.update(manifest))
    with pytest.raises(ArrieroError, match=rf"core\.safetensors: its chunks make .* {core.sha256[:12]}.*expected"):
        take(store, tmp_path / "edge")


def test_a_damaged_bundle_is_mended_when_it_is_verified(
    bundle: Path, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for bound in ("FULL_HASH_BYTES", "QUICK_HASH_BYTES"):
        monkeypatch.setattr(f"arriero.runtimes.integrity.{bound}", 0)
    push(bundle, store)
    take(store, tmp_path / "edge")
    core = tmp_path / "edge" / "weights" / "core.safetensors"
    core.write_bytes(bytes(CHUNK) + core.read_bytes()[CHUNK:])
    assert take(store, tmp_path / "edge").current
    assert take(store, tmp_path / "edge", verify=True).fetched_bytes == CHUNK
    assert contents(tmp_path / "edge") == contents(bundle)


def test_files_of_the_users_are_kept(bundle: Path, store: ObjectStore, tmp_path: Path) -> None:
    push(bundle, store)
    (tmp_path / "edge").mkdir()
    (tmp_path / "edge" / "thesis.txt").write_text("years of work")
    with pytest.raises(ArrieroError, match="edge: is in the bundle's place and is no bundle"):
        take(store, tmp_path / "edge")
    take(store, tmp_path / "mine", name="edge")
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    change_chunk(bundle, "text.json", 0)
    push(bundle, store)
    with pytest.raises(ArrieroError, match=r"mine: holds files that are not the bundle's: notes\.txt"):
        take(store, tmp_path / "mine", name="edge")
    assert (tmp_path / "edge" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("address", "kind", "sentence"),
    [
        ("nothing://x", ArrieroError, "nothing://x: is no store"),
        ("oss://x", MachineLacks, "oss://x: its protocol needs another package"),
    ],
)
def test_addresses_that_open_no_store(address: str, kind: type[ArrieroError], sentence: str) -> None:
    with pytest.raises(kind, match=sentence) as caught:
        open_store(address)
    assert caught.value.exit_code == kind.exit_code
