"""Broken bundles: each is refused with the sentence that names what is broken and what to do."""

import contextlib
import hashlib
import json
import platform
import shutil
import subprocess
import sys

import pytest

import arriero
from arriero.errors import ArrieroError, MachineLacks
from arriero.runtimes import integrity, manifest
from arriero.runtimes.integrity import check_files, open_manifest
from arriero.runtimes.machine_fit import check_machine
from arriero.runtimes.manifest import FileRecord, Manifest
from tests.runtimes.conftest import seal, write_manifest


@pytest.fixture
def copy(bundle, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(bundle, folder)
    return folder


def edit(folder, change):
    """Change the manifest as if it had been built so: its hash chain is made to fit, where it still can."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    with contextlib.suppress(KeyError, TypeError):
        seal(manifest)
    path.write_text(json.dumps(manifest))


def drop(*keys):
    def change(manifest):
        for key in keys[:-1]:
            manifest = manifest[key]
        del manifest[keys[-1]]

    return change


def put(value, *keys):
    def change(manifest):
        for key in keys[:-1]:
            manifest = manifest[key]
        manifest[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (put(1, "format"), r"format 1; expected format 5\. Use the arriero that built it"),
        (put("3", "format"), "has format '3'"),
        (drop("files"), "keys are missing: files"),
        (drop("format"), "keys are missing: format"),
        (drop("target", "context"), "manifest.json:target: the key 'context' is missing"),
        (drop("target", "kv_cache"), "manifest.json:target: the key 'kv_cache' is missing"),
        (
            put("much", "target", "context"),
            "manifest.json:target.context: an entry has the wrong shape: 'much'; expected a value of type int",
        ),
        (put(0, "target", "batch"), "batch 0; expected at least 1"),
        (put("openvino", "target", "backend"), "the backend 'openvino' is unknown; expected one of onnxruntime, tvm"),
        (drop("model", "text", "head_dim"), "manifest.json:model: the key 'head_dim' is missing"),
        (put("many", "model", "text", "head_dim"), "manifest.json:model: an entry has the wrong shape"),
        (put(3, "model", "text", "num_hidden_layers"), "2 layers are listed; expected 3"),
        (put("sliding", "model", "text", "layers", 0, "attention"), r"layers\[0\]: attention 'sliding'"),
        (put({"model": "scout"}, "source"), "manifest.json:source: the key 'layout' is missing"),
        (put({}, "files"), "no files are recorded"),
        (put({"bytes": 1}, "files", "text.onnx"), "manifest.json:files.text.onnx: the key 'sha256' is missing"),
        (put({"bytes": 1, "sha256": ""}, "files", "../x"), "'../x' points outside the bundle"),
        (put({"bytes": 1, "sha256": ""}, "files", "/etc/x"), "'/etc/x' points outside the bundle"),
        (put(100, "model", "text", "vocab_size"), "the tokenizer knows 266 tokens, the model 100"),
        (put(7, "model", "image_token_id"), r"<\|patch\|> has id 261; expected 7"),
        (put(56, "model", "vision", "image_size"), "tiles are 28 pixels wide; expected 56"),
    ],
)
def test_a_wrong_manifest_is_refused(copy, change, sentence):
    edit(copy, change)
    with pytest.raises(ArrieroError, match=sentence):
        arriero.load(copy)


def test_a_bundle_says_what_it_was_made_of(copy):
    """Bundles from before they said so are read all the same."""
    assert Manifest.read(copy).source is None
    made = {"model": "scout", "layout": "GGUF", "adapters": ["one", "two"]}
    edit(copy, put(made, "source"))
    manifest = open_manifest(copy)
    assert str(manifest.source) == "scout in the layout GGUF, with one, two merged"
    assert not manifest.synthetic
    edit(copy, put(made | {"model": "synthetic://guard", "synthetic": True}, "source"))
    assert str(Manifest.read(copy).source).startswith("synthetic weights, drawn by synthetic://guard:")


def test_missing_and_unreadable_manifests(copy, tmp_path):
    with pytest.raises(ArrieroError, match="no such bundle directory"):
        arriero.load(tmp_path / "nowhere")
    path = copy / "manifest.json"
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    with pytest.raises(ArrieroError, match=r"manifest.json:1: is not valid JSON.*Copy the bundle again"):
        arriero.load(copy)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ArrieroError, match=r"manifest.json: is not UTF-8 text"):
        arriero.load(copy)
    path.write_text("[1]")
    with pytest.raises(ArrieroError, match="not a JSON object"):
        arriero.load(copy)
    path.unlink()
    with pytest.raises(ArrieroError, match=r"has no manifest.json.*arriero build"):
        arriero.load(copy)
    (tmp_path / "x.partial").mkdir()
    with pytest.raises(ArrieroError, match="build was not finished"):
        arriero.load(tmp_path / "x.partial")


@pytest.mark.parametrize("name", ["text.onnx", "embed.onnx", "tokenizer/tokenizer.json"])
def test_damaged_files_are_refused(copy, name):
    path = copy / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(ArrieroError, match=rf"{name}: the file has {len(whole) - 10} bytes.*Copy the bundle again"):
        arriero.load(copy)
    path.write_bytes(whole[:-10] + bytes(10))
    with pytest.raises(ArrieroError, match=f"{name}: the file's content was changed"):
        arriero.load(copy)
    path.unlink()
    with pytest.raises(ArrieroError, match=f"{name}: the file is missing"):
        arriero.load(copy)


def test_all_damage_is_told_at_once(copy):
    (copy / "text.onnx").unlink()
    (copy / "embed.onnx").write_bytes(b"")
    with pytest.raises(ArrieroError, match="2 problems") as caught:
        arriero.load(copy)
    assert "text.onnx" in str(caught.value)
    assert "embed.onnx" in str(caught.value)


def test_large_files_of_large_bundles_are_hashed_on_request(copy, monkeypatch):
    monkeypatch.setattr(integrity, "FULL_HASH_BYTES", 10)
    monkeypatch.setattr(integrity, "QUICK_HASH_BYTES", (copy / "text.onnx").stat().st_size)
    vision = copy / "vision.onnx"  # the largest file
    vision.write_bytes(bytes(vision.stat().st_size))
    check_files(Manifest.read(copy))
    with pytest.raises(ArrieroError, match=r"vision\.onnx: the file's content was changed"):
        check_files(Manifest.read(copy), full=True)
    with pytest.raises(ArrieroError, match=r"vision\.onnx"):
        arriero.load(copy, verify=True)


def test_a_large_file_is_recorded_and_checked_chunk_by_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "CHUNK_BYTES", 4096)
    file = tmp_path / "weights.safetensors"
    content = bytes(range(256)) * 48  # three chunks
    file.write_bytes(content + b"end")
    record = FileRecord.of(file)
    assert record.chunks == tuple(
        hashlib.sha256(part).hexdigest() for part in (content[:4096], content[4096:8192], content[8192:], b"end")
    )
    assert (record.bytes, record.sha256) == (len(content) + 3, hashlib.sha256(content + b"end").hexdigest())
    assert FileRecord(**record.entry()).damage(file) is None
    for places in ([5000], [8191, 12288]):
        damaged = bytearray(content + b"end")
        for place in places:
            damaged[place] ^= 1
        file.write_bytes(damaged)
        assert record.damage(file) == f"{len(places)} of 4 chunks, the first from byte 4096 on"
    small = tmp_path / "small"
    small.write_bytes(content[:4096])
    assert "chunks" not in FileRecord.of(small).entry()
    small.write_bytes(content[1:4097])
    assert "sha256" in str(FileRecord.of(small).damage(file))


def test_another_processor_is_refused_and_its_synonym_is_not(copy, monkeypatch):
    edit(copy, put("riscv64", "target", "arch"))
    with pytest.raises(MachineLacks, match="built for riscv64 and this machine is"):
        arriero.load(copy)
    foreign = open_manifest(copy, full=True)  # it is what it says all the same
    with pytest.raises(MachineLacks, match="built for riscv64"):
        check_machine(foreign)
    monkeypatch.setattr(platform, "machine", lambda: "AMD64")
    edit(copy, put("x86_64", "target", "arch"))
    arriero.load(copy, threads=1).close()


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("tokenizer.json", "{}", "the tokenizer cannot be read"),
        ("tokenizer_config.json", "{", "tokenizer_config.json:1: is not valid JSON"),
        ("tokenizer_config.json", "[]", "is not a JSON object"),
        ("chat_template.jinja", "{% if %}", "chat template is broken at line 1"),
        (
            "processor_config.json",
            '{"patch_size": 7, "pixel_shuffle_ratio": 1.0}',
            "make 16 tokens per tile; expected 4",
        ),
        ("preprocessor_config.json", "{}", "image settings are missing"),
        ("preprocessor_config.json", '{"size": {"height": 28, "width": 56}}', "expected a square"),
        (
            "preprocessor_config.json",
            '{"size": {"height": 28, "width": 28}, "resample": 3}',
            "resample: is 3",
        ),
        (
            "preprocessor_config.json",
            '{"size": {"height": 28, "width": 28}, "do_resize": false}',
            "do_resize: is F",
        ),
    ],
)
def test_a_wrong_tokenizer_folder_is_refused(copy, name, content, sentence):
    (copy / "tokenizer" / name).write_text(content)
    write_manifest(copy)
    with pytest.raises(ArrieroError, match=sentence):
        arriero.load(copy)


@pytest.mark.parametrize("threads", [0, 1025, 100_000, "x", True])
def test_threads_are_checked(bundle, threads):
    with pytest.raises(ArrieroError, match=f"threads is {threads!r}; expected a whole number from 1 to 1,024"):
        arriero.load(bundle, threads=threads)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"bundle": None}, "bundle is None; expected the path of a bundle directory"),
        ({"batch": "x"}, "batch is 'x'; expected a whole number"),
        ({"prefix_cache": "1GiB"}, "prefix_cache is '1GiB'; expected a whole number"),
        ({"speculate": None}, "speculate is None; expected 0, or up to 15 tokens"),
        ({"adapter": 3}, "there is no adapter 3"),
    ],
)
def test_what_is_of_another_type_is_refused(bundle, settings, sentence):
    with pytest.raises(ArrieroError, match=sentence):
        arriero.load(**{"bundle": bundle, **settings})


def test_the_runtime_answers_without_the_export_libraries(bundle):
    script = f"""
import sys, arriero
print(len(arriero.load({str(bundle)!r}, threads=1).generate("hi", max_tokens=3).token_ids))
heavy = {{"torch", "onnx", "transformers", "safetensors", "pydantic", "av", "typer"}}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["3", "[]"]


@pytest.mark.parametrize("name", ["text.onnx", "tokenizer", "tokenizer/chat_template.jinja", "extra.so"])
def test_a_link_that_leads_out_of_the_bundle_is_refused(copy, tmp_path, name):
    """A recorded file, a folder, and one that no manifest names: what is equal out there today may not be tomorrow."""
    path, outside = copy / name, tmp_path / "outside"
    if path.exists():
        path.rename(outside)
    path.symlink_to(outside)
    with pytest.raises(ArrieroError, match=rf"{name}: the link leads out of the bundle; .*cp -rL"):
        arriero.load(copy)


def test_a_link_within_the_bundle_and_a_link_to_it_are_its_own(copy, tmp_path):
    (copy / "text.onnx").rename(copy / "graph.onnx")
    (copy / "text.onnx").symlink_to("graph.onnx")
    (tmp_path / "link").symlink_to(copy)
    arriero.load(tmp_path / "link").close()


@pytest.mark.parametrize("name", ["text.so", "text.so.1", "text.engine", "vision.plan"])
def test_what_is_code_is_hashed_at_every_load_however_large_the_bundle(copy, monkeypatch, name):
    (copy / name).write_bytes(b"code")
    write_manifest(copy)
    monkeypatch.setattr(integrity, "FULL_HASH_BYTES", 0)
    monkeypatch.setattr(integrity, "QUICK_HASH_BYTES", 0)
    arriero.load(copy).close()
    (copy / name).write_bytes(b"edoc")
    with pytest.raises(ArrieroError, match=rf"{name}: the file's content was changed"):
        arriero.load(copy, verify=False)
