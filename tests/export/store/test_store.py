"""Bundles pushed and pulled: only what changed travels, and whatever is cut short goes on."""

from __future__ import annotations

import functools
import hashlib
import http.server
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from arriero.errors import ArrieroError, MachineLacks
from arriero.export.store import arrival, objects, pull
from arriero.export.store.layout import chunk
from arriero.export.store.list_bundles import list_bundles
from arriero.export.store.objects import FolderStore, ObjectStore, UrlStore
from arriero.runtimes.integrity import open_manifest
from tests.command import arriero, contents
from tests.export.store.conftest import CHUNK, Counted, change_chunk, make_bundle, push, record_files, take
from tests.stopping import COUNTED

CHUNKS = 6 + 6 + 1 + 1 + 1  # core, experts, text.json, two reports; an empty file has none


def test_a_bundle_arrives_as_it_was_pushed(bundle: Path, store: ObjectStore, tmp_path: Path) -> None:
    pushed = push(bundle, store)
    assert (pushed.name, pushed.chunks, pushed.sent_chunks) == ("edge", CHUNKS, CHUNKS)
    assert pushed.version == hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest()
    pulled = take(store, tmp_path / "device" / "edge")
    assert (pulled.version, pulled.fetched_bytes, pulled.bytes) == (pushed.version, pushed.bytes, pushed.bytes)
    assert contents(tmp_path / "device" / "edge") == contents(bundle)
    assert [path.name for path in (tmp_path / "device").iterdir()] == ["edge"]
    open_manifest(tmp_path / "device" / "edge", full=True)
    again = Counted(store)
    assert (push(bundle, again).sent_bytes, take(again, tmp_path / "device" / "edge").current) == (0, True)
    assert (again.written_chunks, again.read_chunks) == ([], [])


def test_only_changed_chunks_travel(bundle: Path, store: ObjectStore, tmp_path: Path) -> None:
    push(bundle, store)
    take(store, tmp_path / "edge")
    change_chunk(bundle, "weights/core.safetensors", 2)
    counted = Counted(store)
    pushed = push(bundle, counted)
    assert (len(counted.written_chunks), pushed.sent_chunks, pushed.sent_bytes) == (1, 1, CHUNK)
    assert take(counted, tmp_path / "edge").fetched_bytes == CHUNK
    assert counted.read_chunks == counted.written_chunks
    assert contents(tmp_path / "edge") == contents(bundle)


@pytest.mark.parametrize("backend", ["tvm", "onnxruntime", "one of a later version"])
def test_another_bundle_gives_its_chunks(bundle: Path, store: ObjectStore, tmp_path: Path, backend: str) -> None:
    """Files that are the same are linked, but where `onnx.checker` refuses links; one that is not is put together."""
    record_files(bundle, backend)
    push(bundle, store)
    take(store, tmp_path / "old", name="edge")
    change_chunk(bundle, "weights/experts.safetensors", 5)
    push(bundle, store)
    old = contents(tmp_path / "old")
    pulled = take(store, tmp_path / "new", name="edge", over=[tmp_path / "old"])
    assert pulled.fetched_bytes == 100
    assert contents(tmp_path / "new") == contents(bundle)
    assert contents(tmp_path / "old") == old
    core, experts = ("weights/core.safetensors", "weights/experts.safetensors")
    assert (tmp_path / "new" / core).samefile(tmp_path / "old" / core) == (backend != "onnxruntime")
    assert not (tmp_path / "new" / experts).samefile(tmp_path / "old" / experts)


def test_versions_are_listed_and_pulled_by_their_first_digits(bundle: Path, store: ObjectStore, tmp_path: Path) -> None:
    first = push(bundle, store)
    change_chunk(bundle, "text.json", 0)
    second = push(bundle, store)
    push(bundle, store, "other")
    listed = list_bundles(store)
    assert [(one.name, one.version, one.latest) for one in listed] == [
        ("edge", second.version, True),
        ("edge", first.version, False),
        ("other", second.version, True),
    ]
    assert all((one.problem, one.proven, one.bytes) == (None, True, first.bytes) for one in listed)
    assert take(store, tmp_path / "edge", version=first.version[:6]).version == first.version
    assert take(store, tmp_path / "edge").version == second.version
    assert take(store, tmp_path / "edge", version=first.version).version == first.version
    for digits in ("", "x" * 64, "../../secret"):
        with pytest.raises(ArrieroError, match=r"\d versions of edge begin with .* expected one of"):
            take(store, tmp_path / "edge", version=digits)
    with pytest.raises(ArrieroError, match="nobody/latest: is not in the store"):
        take(store, tmp_path / "nobody")


def test_two_pushes_at_once_share_their_chunks(bundle: Path, tmp_path: Path) -> None:
    other = make_bundle(tmp_path / "other")
    change_chunk(other, "weights/core.safetensors", 0)
    script = (
        "import sys; from arriero.runtimes import manifest; manifest.CHUNK_BYTES = 4096\n"
        "from arriero.export.__main__ import main; main()"
    )
    pushes = [
        subprocess.Popen([sys.executable, "-c", script, "push", str(folder), str(tmp_path / "store")])
        for folder in (bundle, other)
    ]
    assert [one.wait() for one in pushes] == [0, 0]
    assert len(list((tmp_path / "store" / "chunks").iterdir())) == CHUNKS + 1
    for folder in (bundle, other):
        take(FolderStore(tmp_path / "store"), tmp_path / "device" / folder.name)
        assert contents(tmp_path / "device" / folder.name) == contents(folder)
    assert not list((tmp_path / "store" / "incoming").iterdir())


def test_a_push_that_was_cut_short_goes_on(bundle: Path, store: ObjectStore, tmp_path: Path) -> None:
    cut = Counted(store, fails_after=5)
    with pytest.raises(ConnectionError):
        push(bundle, cut)
    assert list_bundles(store) == []
    rest = Counted(store)
    push(bundle, rest)
    assert len(cut.written_chunks) == 5
    assert not set(cut.written_chunks) & set(rest.written_chunks)
    take(store, tmp_path / "edge")
    assert contents(tmp_path / "edge") == contents(bundle)


def test_a_pull_that_was_cut_short_goes_on(bundle: Path, store: ObjectStore, tmp_path: Path) -> None:
    push(bundle, store)
    cut = Counted(store, fails_after=9)
    with pytest.raises(ConnectionError):
        take(cut, tmp_path / "edge")
    assert not (tmp_path / "edge").exists()
    rest = Counted(store)
    take(rest, tmp_path / "edge")
    # those on their way when the line was cut had arrived in memory alone
    assert len(rest.read_chunks) <= CHUNKS - 9 + 4
    assert contents(tmp_path / "edge") == contents(bundle)
    assert not (tmp_path / "edge.pulling").exists()


CUT = (
    """
import os, signal, sys
from pathlib import Path
from arriero.runtimes import manifest
manifest.CHUNK_BYTES = 4096
from arriero.export.store import arrival, pull, push
from arriero.export.store.objects import FolderStore
"""
    + COUNTED
    + """
Path.rename, Path.unlink, os.replace = counted(Path.rename), counted(Path.unlink), counted(os.replace)
os.fsync, arrival.link_file = counted(os.fsync), counted(arrival.link_file)
FolderStore.read, FolderStore.write = counted(FolderStore.read), counted(FolderStore.write)
store, silent = FolderStore(Path("store")), lambda *_: None
if sys.argv[1] == "push":
    push.push_bundle(Path("built/edge"), store, silent)
else:
    pull.pull_bundle(store, Path("device/edge"), silent)
"""
)


@pytest.mark.parametrize("verb", ["push", "pull", "pull over"])
def test_killed_at_any_moment_it_goes_on(bundle: Path, tmp_path: Path, verb: str) -> None:
    """Afterwards there is no bundle, the old one or the new one, whole; and what arrived does not travel again."""
    store, device = FolderStore(tmp_path / "store"), tmp_path / "device" / "edge"
    old: dict[str, str] = {}
    if verb == "pull over":
        push(bundle, store)
        take(store, device)
        old = contents(device)
        change_chunk(bundle, "weights/experts.safetensors", 1)
    if verb != "push":
        push(bundle, store)
    new, steps, kills = contents(bundle), 0, 0
    while True:
        child = subprocess.run([sys.executable, "-c", CUT, verb.split()[0], str(steps)], cwd=tmp_path)
        if verb == "push":
            chunks = store.names("chunks")
            assert all(hashlib.sha256(store.read(chunk(name), CHUNK)).hexdigest() == name for name in chunks)
            assert child.returncode == 0 or not list_bundles(store) or list_bundles(store)[0].problem is None
        elif device.exists():
            assert contents(device) in (old, new)
        if child.returncode == 0:
            break
        assert child.returncode == -signal.SIGKILL
        # a few steps further each time, so that a killed try is always followed by one that finds its remains
        steps, kills = steps + 3, kills + 1
    assert kills >= 4
    if verb == "push":
        take(store, device)
    assert contents(device) == new
    assert [path.name for path in device.parent.iterdir()] == ["edge"]


def test_what_killed_pushes_left_goes_in_time(bundle: Path, tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    push(bundle, store)
    abandoned, busy = (tmp_path / "store" / "incoming" / name for name in ("old", "new"))
    for scratch in (abandoned, busy):
        scratch.write_bytes(b"half")
    os.utime(abandoned, (time.time() - 2 * objects.ABANDONED,) * 2)
    push(bundle, store)
    assert (abandoned.exists(), busy.exists()) == (False, True)


def test_a_bundle_with_a_proof_of_its_own_stays(bundle: Path, store: ObjectStore, tmp_path: Path) -> None:
    """What a device proved is not lost to the unproven version that it pulled, and can be pushed back."""
    whole = contents(bundle)
    shutil.copytree(bundle, tmp_path / "unproven")
    for report in ("parity.json", "parity.html"):
        (tmp_path / "unproven" / report).unlink()
    record_files(tmp_path / "unproven")
    unproven = push(tmp_path / "unproven", store, "edge")
    assert not list_bundles(store)[0].proven
    take(store, tmp_path / "device", name="edge")
    for report in ("parity.json", "parity.html"):
        shutil.copy(bundle / report, tmp_path / "device" / report)
    record_files(tmp_path / "device")
    assert take(store, tmp_path / "device", name="edge").current
    assert contents(tmp_path / "device") == whole
    pushed = push(tmp_path / "device", store, "edge")
    assert (pushed.sent_chunks, pushed.version != unproven.version) == (2, True)


def test_one_pull_at_a_time_works_on_a_folder(bundle: Path, tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    push(bundle, store)
    publisher = pull.Publisher(tmp_path, suffix=pull.PULLING)
    with pull._alone(publisher, tmp_path / "edge"), pytest.raises(ArrieroError, match="another pull is at work"):
        take(store, tmp_path / "edge")
    take(store, tmp_path / "edge")


def test_a_disk_without_room_is_said_before_anything_is_fetched(
    bundle: Path, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(bundle, store)
    monkeypatch.setattr(arrival, "free_disk", lambda _: 100)
    counted = Counted(store)
    with pytest.raises(MachineLacks, match=r"100 B of disk space are free, 45 KiB too little"):
        take(counted, tmp_path / "edge")
    assert counted.read_chunks == []


def test_a_version_over_http(bundle: Path, tmp_path: Path) -> None:
    """A plain file server is store enough for devices that only pull, even one that knows no ranges."""
    pytest.importorskip("aiohttp", reason="needs aiohttp: pip install 'fsspec[http]'")
    push(bundle, FolderStore(tmp_path / "store"))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        store = UrlStore(f"http://127.0.0.1:{server.server_port}/store/")
        assert [one.problem for one in list_bundles(store)] == [None]
        take(store, tmp_path / "device" / "edge")
        with pytest.raises(ArrieroError, match="other/latest: is not in the store"):
            take(store, tmp_path / "other")
        server.shutdown()
    assert contents(tmp_path / "device" / "edge") == contents(bundle)
    with pytest.raises(MachineLacks, match="the store does not answer"):
        take(store, tmp_path / "late", name="edge")


def test_the_commands(bundle: Path, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    pushed = arriero("push", bundle, store)
    assert (pushed.code, f"{CHUNKS} of {CHUNKS} chunks sent" in pushed.out) == (0, True), pushed.err
    assert "push edge" in pushed.err
    version = arriero("push", bundle, f"file://{store}", "--name", "assistant", "--json").json["version"]
    listed = arriero("pull", store)
    assert listed.code == 0
    assert f"{version[:12]}, latest" in listed.out
    assert [one["name"] for one in arriero("pull", store, "--json").json] == ["assistant", "edge"]
    assert [one["name"] for one in arriero("pull", store, "--name", "edge", "--json").json] == ["edge"]
    pulled = arriero("pull", store, tmp_path / "here", "--name", "assistant")
    assert (pulled.code, "fetched" in pulled.out) == (0, True), pulled.err
    assert "is there already" in arriero("pull", store, tmp_path / "here", "--name", "assistant").out
    assert contents(tmp_path / "here") == contents(bundle)
    refused = arriero("pull", store, "--version", "12")
    assert (refused.code, "belong to a bundle's folder" in refused.err) == (2, True)
    refused = arriero("push", bundle, store, "--name", "../up")
    assert (refused.code, "cannot be a bundle's name" in refused.err) == (2, True)
