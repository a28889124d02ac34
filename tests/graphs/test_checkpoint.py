"""Checkpoints read rightly, and each kind of corruption refused with where, what and the remedy."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from arriero.errors import ArrieroError, Problems
from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.sources import content_hash as hashing
from arriero.graphs.sources.content_hash import content_hash, is_damaged
from arriero.graphs.sources.ledger import check_ledger, group_names
from arriero.graphs.sources.safetensors_header import read_header, to_float32

TENSORS = {
    "language_model.model.embed_tokens.weight": torch.arange(48).reshape(8, 6).to(torch.bfloat16),
    "language_model.model.layers.0.feed_forward.experts.down_proj": torch.randn(4, 3, 6).to(torch.float16),
    "language_model.model.norm.weight": torch.randn(6),
    "language_model.lm_head.weight": torch.randn(8, 6).to(torch.bfloat16),
}
SHAPES = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
INDEX = "model.safetensors.index.json"


def make_single(folder: Path, tensors: dict[str, torch.Tensor] = TENSORS, model_type: str = "llama4") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def make_sharded(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama4"}))
    names = list(TENSORS)
    weight_map = {}
    for number, part in enumerate((names[:2], names[2:]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: TENSORS[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_raw(file: Path, header: object, data: bytes = b"", *, text: str | None = None) -> Path:
    raw = (text if text is not None else json.dumps(header)).encode()
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return file


@pytest.mark.parametrize("make", [make_single, make_sharded])
def test_reads_every_tensor_exactly(tmp_path, make):
    checkpoint = Checkpoint.open(make(tmp_path / "c"))
    assert set(checkpoint.tensors) == set(TENSORS)
    check_ledger(checkpoint.tensors.values(), SHAPES)
    for name, tensor in TENSORS.items():
        np.testing.assert_array_equal(checkpoint.read_float32(name), tensor.float().numpy())
        np.testing.assert_array_equal(checkpoint.read_float32(name, 1, 3), tensor[1:3].float().numpy())
        assert torch.equal(checkpoint.torch_tensor(name), tensor)
        assert checkpoint.torch_tensor(name).dtype == tensor.dtype


def test_bf16_comes_as_bits_and_without_a_copy(tmp_path):
    checkpoint = Checkpoint.open(make_single(tmp_path))
    name = "language_model.model.embed_tokens.weight"
    raw = checkpoint.read(name)
    assert raw.dtype == np.uint16
    assert not raw.flags.writeable
    assert np.shares_memory(raw, checkpoint.read_rows(name, 2, 4))
    assert checkpoint.torch_tensor(name).data_ptr() == raw.__array_interface__["data"][0]
    assert checkpoint.read_rows(name, 2, 4).shape == (2, 6)


def test_row_range_outside_the_tensor(tmp_path):
    checkpoint = Checkpoint.open(make_single(tmp_path))
    with pytest.raises(ValueError, match="rows 4:9"):
        checkpoint.read_rows("language_model.model.embed_tokens.weight", 4, 9)


def test_scalar_and_empty_tensors(tmp_path):
    tensors = {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4)}
    checkpoint = Checkpoint.open(make_single(tmp_path, tensors))
    assert checkpoint.read_float32("scalar") == 2.5
    assert checkpoint.read("empty").shape == (0, 4)
    assert checkpoint.torch_tensor("empty").shape == (0, 4)
    assert checkpoint.torch_tensor("scalar") == 2.5


def test_misaligned_data_is_still_read(tmp_path):
    values = np.arange(4, dtype="<f4")
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    make_single(tmp_path)
    for padding in range(4):
        text = json.dumps({"x": entry}) + " " * padding
        write_raw(tmp_path / "model.safetensors", None, values.tobytes(), text=text)
        checkpoint = Checkpoint.open(tmp_path)
        np.testing.assert_array_equal(checkpoint.read_float32("x"), values)
        np.testing.assert_array_equal(checkpoint.torch_tensor("x").numpy(), values)


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.float8_e5m2, "F8_E5M2"), (torch.bfloat16, "BF16")]
)
def test_float_conversion_agrees_with_torch_on_every_bit_pattern(dtype, name):
    bits = torch.arange(256 if name.startswith("F8") else 65536)
    raw = bits.to(torch.uint8) if name.startswith("F8") else bits.to(torch.uint16)
    np.testing.assert_array_equal(to_float32(raw.numpy(), name), raw.view(dtype).float().numpy())


def test_integers_are_not_converted():
    with pytest.raises(ValueError, match="I64"):
        to_float32(np.zeros(1, np.int64), "I64")


def test_text_only_names_become_multimodal(tmp_path):
    tensors = {name.removeprefix("language_model."): tensor for name, tensor in TENSORS.items()}
    checkpoint = Checkpoint.open(make_single(tmp_path, tensors, "llama4_text"))
    assert checkpoint.text_only
    assert set(checkpoint.tensors) == set(TENSORS)
    assert checkpoint.source("language_model.model.norm.weight").stored.startswith("model.norm.weight in ")


def test_unknown_tensor_names_its_nearest(tmp_path):
    checkpoint = Checkpoint.open(make_single(tmp_path))
    with pytest.raises(ArrieroError, match=r"no tensor language_model.norm.weight.*language_model.model.norm.weight"):
        checkpoint.read("language_model.norm.weight")


# --- corruption -------------------------------------------------------------------------------------------------


def entry(dtype: str = "F32", shape: tuple[int, ...] = (2,), begin: int = 0, end: int = 8) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


HEADERS = {
    "not an object": ([1], b"", "not a JSON object"),
    "no dtype": ({"x": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8), "header entry is malformed"),
    "no offsets": ({"x": {"dtype": "F32", "shape": [2]}}, bytes(8), "header entry is malformed"),
    "three offsets": ({"x": {**entry(), "data_offsets": [0, 4, 8]}}, bytes(8), "header entry is malformed"),
    "backward": ({"x": entry(begin=8, end=0)}, bytes(8), "two ascending data_offsets"),
    "negative shape": ({"x": entry(shape=(-2,))}, bytes(8), "header entry is malformed"),
    "fraction": ({"x": {**entry(), "shape": [2.0]}}, bytes(8), "header entry is malformed"),
    "entry is a list": ({"x": [1]}, bytes(8), "header entry is malformed"),
    "unknown dtype": ({"x": entry("F4")}, bytes(8), "unknown dtype 'F4'; expected one of BOOL"),
    "unhashable dtype": ({"x": {**entry(), "dtype": [1]}}, bytes(8), "malformed"),
    "size": ({"x": entry(shape=(3,))}, bytes(8), r"shape \[3\] of F32 is 12 bytes, but its offsets span 8"),
    "overlap": ({"x": entry(), "y": entry(begin=4, end=12)}, bytes(12), "y: overlaps x by 4 bytes"),
    "hole": ({"x": entry(), "y": entry(begin=12, end=20)}, bytes(20), "y: 4 unclaimed bytes lie between x"),
    "late start": ({"x": entry(begin=4, end=12)}, bytes(12), "4 unclaimed bytes lie between the header"),
    "truncated": ({"x": entry(), "y": entry(begin=8, end=16)}, bytes(12), "is truncated.*1 tensors cut off.*first y"),
    "trailing": ({"x": entry()}, bytes(11), "3 bytes follow the last tensor"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_bad_header(tmp_path, case):
    header, data, message = HEADERS[case]
    file = write_raw(tmp_path / "model.safetensors", header, data)
    with pytest.raises(ArrieroError) as caught:
        read_header(file)
    text = str(caught.value)
    assert re.search(message, text), text
    assert str(file) in text
    assert "Download or copy this file again" in text


RAW = {
    "empty": (b"", "0 bytes long, too short"),
    "short": (b"abc", "3 bytes long, too short"),
    "html": (b"<!DOCTYPE html><html>not found</html>", "so this is no safetensors file"),
    "zero header": (bytes(16), "claims 0 bytes"),
    "cut header": ((500).to_bytes(8, "little") + b"{", "truncated inside its header: 9 bytes; expected more than 508"),
    "not json": ((5).to_bytes(8, "little") + b"{'a'}", "is not valid JSON"),
    "not text": ((4).to_bytes(8, "little") + b"\xff\xfe\xfd\xfc", "is not UTF-8 text"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer.*git lfs pull"),
}


@pytest.mark.parametrize("case", RAW)
def test_not_a_safetensors_file(tmp_path, case):
    make_single(tmp_path)
    content, message = RAW[case]
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(Problems) as caught:
        Checkpoint.open(tmp_path)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert str(tmp_path / "model.safetensors") in str(caught.value)


def test_the_same_name_twice_in_one_header(tmp_path):
    one = json.dumps(entry())
    file = write_raw(tmp_path / "model.safetensors", None, bytes(8), text=f'{{"x": {one}, "x": {one}}}')
    with pytest.raises(Problems, match=r"model.safetensors:x: is in the header twice"):
        read_header(file)


def test_all_header_problems_at_once(tmp_path):
    header = {"a": entry("F4"), "b": entry(shape=(9,)), "c": [], "d": entry()}
    with pytest.raises(Problems) as caught:
        read_header(write_raw(tmp_path / "m.safetensors", header, bytes(8)))
    assert len(caught.value.problems) == 3


FOLDERS = {
    "no folder": (lambda f: f.rename(f.with_name("moved")), "there is no such folder; expected a checkpoint folder"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: is missing. Download config.json"),
    "config not json": (lambda f: (f / "config.json").write_text('{\n"a": }'), "config.json:2: is not valid JSON"),
    "config not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "config.json: is not UTF-8 text"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "config.json: is not a JSON object"),
    "other model": (
        lambda f: (f / "config.json").write_text('{"model_type": "mixtral"}'),
        "config.json:model_type: model_type is 'mixtral'; expected llama4 or llama4_text",
    ),
    "no model type": (lambda f: (f / "config.json").write_text("{}"), "model_type is missing"),
    "no weights": (lambda f: (f / INDEX).unlink(), r"no weights found \(it holds model-00001.*Hugging Face safetens"),
    "both layouts": (lambda f: save_file({}, f / "model.safetensors"), "has both model.safetensors and model.safet"),
    "empty index": (lambda f: (f / INDEX).write_text('{"weight_map": {}}'), "weight_map is missing or empty"),
    "index not json": (lambda f: (f / INDEX).write_text("{"), "index.json:1: is not valid JSON"),
    "missing shard": (
        lambda f: (f / "model-00002-of-00002.safetensors").unlink(),
        r"shard model-00002-of-00002.safetensors is missing \(2 tensors\). Download model-00002",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_bad_folder(tmp_path, case):
    folder = make_sharded(tmp_path / "c")
    damage, message = FOLDERS[case]
    damage(folder)
    with pytest.raises(ArrieroError) as caught:
        Checkpoint.open(folder)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert str(folder) in str(caught.value)


def edit_index(folder: Path, **changes: str | None) -> None:
    content = json.loads((folder / INDEX).read_text())
    content["weight_map"] = {k: v for k, v in {**content["weight_map"], **changes}.items() if v is not None}
    (folder / INDEX).write_text(json.dumps(content))


def test_index_points_outside_the_folder(tmp_path):
    folder = make_sharded(tmp_path / "c")
    edit_index(folder, extra="../other.safetensors")
    with pytest.raises(Problems, match=r"\.\./other\.safetensors is not a plain file name"):
        Checkpoint.open(folder)


def test_index_and_shards_disagree(tmp_path):
    folder = make_sharded(tmp_path / "c")
    edit_index(folder, ghost="model-00001-of-00002.safetensors", **{"language_model.model.norm.weight": None})
    with pytest.raises(Problems) as caught:
        Checkpoint.open(folder)
    text = str(caught.value)
    assert "model-00001-of-00002.safetensors does not hold ghost" in text
    assert "tensor language_model.model.norm.weight is not in the index" in text
    assert "download them together" in text
    assert len(caught.value.problems) == 2


def test_tensor_in_two_shards(tmp_path):
    folder = make_sharded(tmp_path / "c")
    name = "language_model.model.norm.weight"
    file = "model-00001-of-00002.safetensors"
    content = {n: TENSORS[n] for n in list(TENSORS)[:2]} | {name: TENSORS[name]}
    save_file(content, folder / file)
    with pytest.raises(Problems, match=rf"tensor {name} is stored twice, first as {name} in {file}. Remove"):
        Checkpoint.open(folder)


def test_two_broken_shards_are_both_named(tmp_path):
    folder = make_sharded(tmp_path / "c")
    for number in (1, 2):
        shard = folder / f"model-0000{number}-of-00002.safetensors"
        shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(Problems) as caught:
        Checkpoint.open(folder)
    assert [str(p).count("is truncated") for p in caught.value.problems] == [1, 1]


# --- ledger -----------------------------------------------------------------------------------------------------


def ledger(tmp_path: Path, tensors: dict[str, torch.Tensor], allowed: tuple[str, ...] = ()) -> str:
    checkpoint = Checkpoint.open(make_single(tmp_path, tensors))
    with pytest.raises(Problems) as caught:
        check_ledger(checkpoint.tensors.values(), SHAPES, allowed)
    return str(caught.value)


def test_ledger_lists_all_kinds_at_once(tmp_path):
    tensors = {name: tensor.clone() for name, tensor in TENSORS.items()}
    tensors["surprise"] = torch.zeros(2)
    tensors["language_model.model.norm.weight"] = torch.zeros(6, dtype=torch.int32)
    tensors["language_model.model.embed_tokens.weight"] = torch.zeros(8, 7)
    del tensors["language_model.lm_head.weight"]
    text = ledger(tmp_path, tensors)
    assert "4 problems" in text
    assert "surprise: is unknown to the config. Is config.json the one of these weights?" in text
    assert "language_model.model.norm.weight: is stored as I32; expected BF16 or F16 or F32" in text
    assert "embed_tokens.weight: has shape [8, 7]; expected [8, 6]. config.json and the weights" in text
    assert "language_model.lm_head.weight: is missing. Is a shard missing" in text


def test_ledger_refuses_f8(tmp_path):
    name = "language_model.model.layers.0.feed_forward.experts.down_proj"
    text = ledger(tmp_path, TENSORS | {name: TENSORS[name].to(torch.float8_e4m3fn)})
    assert f"{name}: is stored as F8_E4M3" in text
    assert "Is its scale missing, or quantization_config in config.json?" in text


def test_ledger_allows_named_extras_only_in_full(tmp_path):
    extra = TENSORS | {"rope.inv_freq": torch.zeros(2), "rope.inv_freq_2": torch.zeros(2)}
    text = ledger(tmp_path, extra, (r"rope\.inv_freq",))
    assert "1 problem" in text
    assert "rope.inv_freq_2" in text


def test_ledger_names_a_duplicate(tmp_path):
    infos = list(Checkpoint.open(make_single(tmp_path)).tensors.values())
    with pytest.raises(Problems, match=f"{infos[0].name}: is there twice"):
        check_ledger([*infos, infos[0]], SHAPES)


def test_layers_share_a_line():
    names = [f"layers.{n}.x" for n in (0, 1, 2, 7)] + ["norm", "layers.3.y"]
    assert group_names(names) == ["layers.{0-2,7}.x (4 tensors)", "norm", "layers.3.y"]


# --- content hash -----------------------------------------------------------------------------------------------


def test_content_hash_follows_every_file(tmp_path):
    memo = tmp_path / "work" / "hashes.jsonl"
    folder = make_sharded(tmp_path / "c")
    hashes = [Checkpoint.open(folder).content_hash(memo)]
    (folder / "tokenizer.json").write_text("{}")
    hashes.append(Checkpoint.open(folder).content_hash(memo))
    shard = folder / "model-00001-of-00002.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    hashes.append(Checkpoint.open(folder).content_hash(memo))
    for name in ("LICENSE", "USE_POLICY.md", "NOTICE.txt"):
        (folder / name).write_text("terms")
        hashes.append(Checkpoint.open(folder).content_hash(memo))
    assert len(set(hashes)) == 6
    assert hashes[-1] == Checkpoint.open(folder).content_hash()


def test_a_content_hash_tells_of_every_byte_that_it_reads(tmp_path):
    memo, told = tmp_path / "hashes.jsonl", []
    checkpoint = Checkpoint.open(make_sharded(tmp_path / "c"))
    sizes = {file.name: file.stat().st_size for file in checkpoint.files}

    def progress(done, total):
        told.append((done, total))

    checkpoint.content_hash(memo, progress)
    assert told[0] == (0, sum(sizes.values()))
    assert told[-1] == (sum(sizes.values()),) * 2
    assert told == sorted(told)
    told.clear()
    checkpoint.content_hash(memo, progress)
    assert not told
    shutil.copyfile(checkpoint.files[0], tmp_path / "copy")
    (tmp_path / "copy").rename(checkpoint.files[0])
    checkpoint.content_hash(memo, progress)
    assert told[-1] == (sizes[checkpoint.files[0].name],) * 2


def test_a_file_replaced_by_one_of_its_size_and_time_is_hashed_anew(tmp_path):
    """As in images of containers, which give every file one time."""
    memo, folder = tmp_path / "hashes.jsonl", make_single(tmp_path / "c")
    files, file = sorted(folder.iterdir()), folder / "config.json"
    before = content_hash(files, memo)
    times = file.stat().st_mtime_ns
    other = tmp_path / "other"
    other.write_bytes(file.read_bytes()[::-1])
    os.utime(other, ns=(times, times))
    other.rename(file)
    os.utime(file, ns=(times, times))
    assert content_hash(files, memo) == content_hash(files) != before


def test_a_file_changed_in_place_with_its_time_set_back_is_hashed_anew(tmp_path):
    memo, folder = tmp_path / "hashes.jsonl", make_single(tmp_path / "c")
    before = Checkpoint.open(folder).content_hash(memo)
    write_in_place(folder / "model.safetensors")
    assert Checkpoint.open(folder).known_content_hash(memo) is None
    assert Checkpoint.open(folder).content_hash(memo) == Checkpoint.open(folder).content_hash() != before


def test_a_link_to_a_file_costs_no_second_reading_and_hides_no_change(tmp_path, monkeypatch):
    """Bundles link the files of which they take every tensor as it is."""
    memo, folder = tmp_path / "hashes.jsonl", make_single(tmp_path / "c")
    checkpoint, file = Checkpoint.open(folder), folder / "model.safetensors"
    before = checkpoint.content_hash(memo)
    (tmp_path / "link").hardlink_to(file)
    with monkeypatch.context() as reading:
        reading.setattr(hashing, "_hash_file", lambda file, weights: pytest.fail(f"{file} is read again"))
        assert checkpoint.known_content_hash(memo) == checkpoint.content_hash(memo) == before
        (tmp_path / "other").hardlink_to(file)
        checkpoint.remember_links(memo)
    write_in_place(file)
    assert checkpoint.known_content_hash(memo) is None
    assert checkpoint.content_hash(memo) != before


def write_in_place(file):
    """Change the last byte; size, inode and time of change stay."""
    times = file.stat().st_mtime_ns
    with file.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last[0] ^ 1]))
    os.utime(file, ns=(times, times))


def test_a_memo_of_another_form_is_as_good_as_none(tmp_path):
    memo, checkpoint = tmp_path / "hashes.jsonl", Checkpoint.open(make_single(tmp_path / "c"))
    for text in ("[]", '{"a|1|2|3": "hash"}', '{"a": {"state": [1], "sha256": "", "checked": []}}', '{"a": null}'):
        for held in (text, f"{hashlib.sha256(text.encode()).hexdigest()} {text}"):
            memo.write_text(held)
            assert is_damaged(memo)
            assert checkpoint.known_content_hash(memo) is None
            assert checkpoint.content_hash(memo) == checkpoint.known_content_hash(memo)


@pytest.mark.parametrize("kind", ["sha256", "checked"])
def test_a_changed_memo_is_not_believed(tmp_path, kind):
    """Neither another hash of a file, nor that weights were looked at which were not."""
    memo, checkpoint = tmp_path / "hashes.jsonl", Checkpoint.open(make_single(tmp_path / "c"))
    right = checkpoint.content_hash(memo)
    checksum, entries = memo.read_text().split(" ", 1)
    held = json.loads(entries)
    for entry in held.values():
        entry[kind] = {"sha256": "0" * 64, "checked": [*entry["checked"], 8]}[kind]
    memo.write_text(f"{checksum} {json.dumps(held)}")
    assert checkpoint.known_content_hash(memo) is None
    assert checkpoint.content_hash(memo) == checkpoint.known_content_hash(memo) == right


def test_known_hash_needs_a_fresh_memo_and_writes_nothing(tmp_path):
    memo = tmp_path / "hashes.jsonl"
    checkpoint = Checkpoint.open(make_single(tmp_path / "c"))
    assert checkpoint.known_content_hash(memo) is None
    assert not memo.exists()
    assert not is_damaged(memo)
    full = checkpoint.content_hash(memo)
    assert not is_damaged(memo)
    assert checkpoint.known_content_hash(memo) == full
    (tmp_path / "c" / "config.json").write_text('{"model_type": "llama4", "a": 1}')
    assert checkpoint.known_content_hash(memo) is None
    memo.write_text("broken")
    assert checkpoint.content_hash(memo) != full
