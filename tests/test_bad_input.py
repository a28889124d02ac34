"""What is truncated, corrupt or of another model is refused: one message with what, where and what to do.

Exit code 2 (3 where the machine lacks something), no traceback, and the bundles that are there stay whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.command import Result, arriero, write_build
from tests.small import edit_json, small_scout
from tests.test_command import contents

PROMPT = "What is 17 + 25?"
EMBEDDING = "language_model.model.embed_tokens.weight"
ROUTER = "language_model.model.layers.1.feed_forward.router.weight"
INDEX = "model.safetensors.index.json"
Change = Callable[[Path], Any]


def case(change: Change, what: str, where: str, remedy: str, code: int = 2) -> Any:
    """A change for the worse, and what its message must say; named after `change`."""
    return pytest.param(change, what, where, remedy, code, id=change.__name__.strip("_").replace("_", "-"))


def check(result: Result, what: str, where: str, remedy: str, code: int = 2) -> None:
    assert result.code == code, result
    assert result.out == ""
    assert "Traceback" not in result.err
    for part in (what, where, remedy):
        assert re.search(part, result.err), f"{part!r} is not in {result.err!r}"


# --- changes: to JSON and to files


def setting(name: str, file: str, **changes: Any) -> Change:
    def change(folder: Path) -> None:
        edit_json(folder / file, **changes)

    change.__name__ = name
    return change


def content(name: str, file: str, new: bytes | None) -> Change:
    def change(folder: Path) -> None:
        (folder / file).unlink()
        if new is not None:
            (folder / file).write_bytes(new)

    change.__name__ = name
    return change


def cut(name: str, file: str, share: float) -> Change:
    def change(folder: Path) -> None:
        os.truncate(folder / file, int(share * (folder / file).stat().st_size))

    change.__name__ = name
    return change


def flip(name: str, file: str, at: float) -> Change:
    def change(folder: Path) -> None:
        data = bytearray((folder / file).read_bytes())
        data[int(at * len(data))] ^= 1
        (folder / file).write_bytes(data)

    change.__name__ = name
    return change


# --- the build file


def line(name: str, old: str, new: str) -> Change:
    def change(text: str) -> str:
        assert old in text
        return text.replace(old, new)

    change.__name__ = name
    return change


BUILD_FILES = [
    case(line("unknown_key", "targets:", "target:"), "unknown key", r"build.yaml:5: target\b", "Did you mean 'targets'"),
    case(line("unknown_profile", "profile: fp32", "profile: int7"), "no profile 'int7'", "build.yaml:6", "int8"),
    case(line("unknown_backend", "backend: onnx", "backend: onxx"), "not valid", "build.yaml:6", "Did you mean"),
    case(line("text_for_a_number", "context: 1024", "context: long"), "'long' is not valid", "build.yaml:6", "a whole number"),
    case(line("two_of_one_name", "name: int8", "name: FP32"), "also the name", "build.yaml:7", "Rename one"),
    case(line("name_no_folder", "name: int8", "name: ../int8"), "cannot be a folder name", "build.yaml:7", "For example"),
    case(line("no_text", "[text, image]", "[image]"), "text is missing", "build.yaml:3", "Write `modalities"),
    case(line("unknown_metric", "thresholds: {}", "thresholds: {same_token: 1.0}"), "no such parity metric", "build.yaml:9", "Did you mean same_top_token"),
    case(line("one_seed_for_both", "seed: 29", "seed: 11"), "also the calibration's", "build.yaml:9", "Change one"),
    case(line("context_beyond_the_model", "context: 1024", "context: 9999"), "9,999 tokens", r"targets\[0\].context", "at most 1,024"),
    case(line("no_yaml", "targets:", "targets: ["), "is not YAML", "build.yaml:6", "Correct this line"),
    case(line("no_model_folder", "scout", "scuot"), "there is no folder", "build.yaml:2: model", "Did you mean|Relative paths"),
    case(line("budget_too_small", "version: 1", "version: 1\nbudgets: {host_memory: 64MiB}"), "memory", "budgets.host_memory", "64", 3),
]  # fmt: skip


@pytest.fixture(scope="module")
def bundles(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two good bundles that no refused command may touch."""
    folder = tmp_path_factory.mktemp("good") / "bundles"
    shutil.copytree(workshop / "bundles", folder)
    return folder


def published(bundles: Path) -> dict[str, str]:
    return contents(bundles / "fp32") | contents(bundles / "int8")


@pytest.mark.parametrize(("change", "what", "where", "remedy", "code"), BUILD_FILES)
@pytest.mark.parametrize("verb", ["plan", "build"])
def test_build_files(workshop, bundles, tmp_path, verb, change, what, where, remedy, code):
    before = published(bundles)
    (tmp_path / "scout").symlink_to(workshop / "scout")
    build_file = write_build(tmp_path / "build.yaml", tmp_path / "scout", profiles=("fp32", "int8"), output=str(bundles))
    build_file.write_text(change(build_file.read_text()))
    check(arriero(verb, build_file), what, where, remedy, code)
    assert published(bundles) == before


def test_a_model_that_is_not_in_the_cache(bundles, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    build_file = write_build(tmp_path / "build.yaml", Path("x"), output=str(bundles))
    build_file.write_text(build_file.read_text().replace("model: x", "model: hf://meta-llama/Llama-4-Scout"))
    refused = arriero("build", build_file)
    check(refused, "not in the Hugging Face cache", "build.yaml:2: model", "hf download meta-llama/Llama-4-Scout", 3)


def test_a_build_file_that_is_not_there(tmp_path):
    check(arriero("build", tmp_path / "build.yml"), "no such build file", "build.yml", "Write a build.yaml")


# --- the checkpoint


def tensors(name: str, edit: Callable[[dict[str, np.ndarray]], Any]) -> Change:
    def change(folder: Path) -> None:
        held = load_bits(folder / "model.safetensors")
        edit(held)
        save_bits(held, folder / "model.safetensors")

    change.__name__ = name
    return change


def load_bits(file: Path) -> dict[str, np.ndarray]:
    from safetensors.torch import load_file as load_torch

    return {name: tensor for name, tensor in load_torch(file).items()}  # type: ignore[misc]


def save_bits(held: dict[str, Any], file: Path) -> None:
    from safetensors.torch import save_file as save_torch

    save_torch(held, file, metadata={"format": "pt"})


def _shard(folder: Path) -> tuple[Path, Path]:
    """Split the weights into two shards with an index; gives the shards."""
    held = load_bits(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(held)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in halves.items():
        save_bits({name: held[name] for name in part}, folder / file)
    listed = {name: file for file, part in halves.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    first, second = (folder / file for file in halves)
    return first, second


def shard_missing(folder: Path) -> None:
    _shard(folder)[1].unlink()


def shard_truncated(folder: Path) -> None:
    os.truncate(_shard(folder)[1], 5000)


def shard_of_another_download(folder: Path) -> None:
    first, second = _shard(folder)
    shutil.copyfile(first, second)


def index_broken(folder: Path) -> None:
    _shard(folder)
    (folder / INDEX).write_text('{"weight_map": {"a":')


def two_sets_of_weights(folder: Path) -> None:
    _shard(folder)
    (folder / "model.safetensors").write_bytes(b"")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def header_twice(folder: Path) -> None:
    """One name twice in the header, as no writer makes it but a merge by hand does."""
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].decode().rstrip()
    entry = f'"{ROUTER}":{json.dumps(json.loads(header)[ROUTER])}'
    header = f"{header[:-1]},{entry}}}"
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode() + data[8 + length :])


CONFIG, TOKENIZER, TILES = "config.json", "tokenizer.json", "preprocessor_config.json"
AGAIN, ORIGINAL = "again", "original checkpoint"
CHECKPOINTS = [
    case(content("config_missing", CONFIG, None), "missing", CONFIG, "Download config.json"),
    case(cut("config_truncated", CONFIG, 0.5), "is not JSON", r"config.json:\d+", AGAIN),
    case(setting("config_of_another_model", CONFIG, model_type="mixtral"), "'mixtral'", "config.json:model_type", "Llama 4"),
    case(setting("rope_unknown", CONFIG, **{"text_config.rope_scaling": {"rope_type": "yarn"}}), "'yarn' is not supported", "text_config.rope_parameters.rope_type", "'llama3'"),
    case(setting("size_no_number", CONFIG, **{"text_config.hidden_size": "64"}), "not a size", "text_config.hidden_size", "positive integer"),
    case(setting("epsilon_no_number", CONFIG, **{"text_config.rms_norm_eps": "tiny"}), "not a number", "text_config.rms_norm_eps", "finite number"),
    case(setting("layers_no_list", CONFIG, **{"text_config.moe_layers": "all"}), "not a list", "text_config.moe_layers", ORIGINAL),
    case(setting("section_no_object", CONFIG, text_config=[]), "'?\\[\\]'? is not a section|tensors are not", "config", "."),
    case(setting("shuffle_zero", CONFIG, **{"vision_config.pixel_shuffle_ratio": 0}), "not a share", "vision_config.pixel_shuffle_ratio", "above 0"),
    case(setting("token_no_id", CONFIG, **{"text_config.eos_token_id": {"a": 1}}), "no token id", "eos_token_id", "a number"),
    case(setting("generation_no_id", "generation_config.json", eos_token_id="</s>"), "no token id", "generation_config.json:eos", "a number"),
    case(setting("activation_unknown", CONFIG, **{"text_config.hidden_act": "gelu"}), "'gelu'", "text_config.hidden_act", "silu"),
    case(setting("experts_of_another_size", CONFIG, **{"text_config.num_local_experts": 8}), r"has shape \[4", "feed_forward", "different models"),
    case(setting("layers_too_many", CONFIG, **{"text_config.num_hidden_layers": 5}), "is missing", "layers.4", "another model"),
    case(cut("weights_truncated", "model.safetensors", 0.7), "truncated", "model.safetensors", AGAIN),
    case(cut("header_truncated", "model.safetensors", 0.001), "truncated inside its header", "model.safetensors", AGAIN),
    case(flip("header_broken", "model.safetensors", 0.00002), "no safetensors file|not JSON|truncated", "model.safetensors", AGAIN),
    case(content("weights_are_a_pointer", "model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"), "Git LFS pointer", "model.safetensors", "git lfs pull"),
    case(header_twice, "in the header twice", ROUTER, AGAIN),
    case(tensors("tensor_missing", lambda held: held.pop(ROUTER)), "is missing", ROUTER, "Is a shard missing"),
    case(tensors("tensor_unknown", lambda held: held.update(extra=held[ROUTER].clone())), "is unknown", "extra", "config.json"),
    case(tensors("tensor_of_another_shape", lambda held: held.update({ROUTER: held[ROUTER][:, :32].contiguous()})), r"shape \[4, 32\]", ROUTER, "different models"),
    case(tensors("tensor_of_another_dtype", lambda held: held.update({ROUTER: held[ROUTER].char()})), "stored as I8", ROUTER, "bf16 checkpoint"),
    case(shard_missing, "00002-of-00002.safetensors is missing", INDEX, "Download"),
    case(shard_truncated, "truncated", "model-00002", AGAIN),
    case(shard_of_another_download, "does not hold", INDEX, "download them together"),
    case(index_broken, "is not JSON", INDEX, AGAIN),
    case(two_sets_of_weights, "has both", "scout", "Remove the one"),
    case(no_weights, "no weights found", "scout", "safetensors layout"),
    case(content("tokenizer_missing", TOKENIZER, None), "tokenizer is missing", TOKENIZER, ORIGINAL),
    case(cut("tokenizer_truncated", TOKENIZER, 0.9), "cannot be read", TOKENIZER, ORIGINAL),
    case(content("template_broken", "chat_template.jinja", b"{% for x in %}"), "template is broken at line 1", "chat_template.jinja", ORIGINAL),
    case(content("template_no_text", "chat_template.jinja", b"\xff\xfe{}"), "not UTF-8", "chat_template.jinja", ORIGINAL),
    case(content("tokenizer_config_broken", "tokenizer_config.json", b"{"), "not valid JSON", "tokenizer_config.json", ORIGINAL),
    case(content("tiles_missing", TILES, None), "image settings are missing", TILES, ORIGINAL),
    case(setting("tiles_of_another_size", TILES, size={"height": 48, "width": 48}), "48 pixels", f"{TILES}:size", ORIGINAL),
    case(setting("tiles_no_size", TILES, size=32), "wrong shape", TILES, ORIGINAL),
    case(setting("tiles_of_other_colours", TILES, image_mean=[0.5]), "wrong shape", TILES, ORIGINAL),
    case(setting("patches_of_another_size", "processor_config.json", patch_size=0), "tokens per tile", "processor_config.json", ORIGINAL),
]  # fmt: skip


@pytest.mark.parametrize(("change", "what", "where", "remedy", "code"), CHECKPOINTS)
def test_checkpoints(workshop, bundles, tmp_path, change, what, where, remedy, code):
    before = published(bundles)
    shutil.copytree(workshop / "scout", tmp_path / "scout")
    change(tmp_path / "scout")
    build_file = write_build(tmp_path / "build.yaml", Path("scout"), profiles=("fp32", "int8"), output=str(bundles))
    check(arriero("build", build_file), what, where, remedy, code)
    assert published(bundles) == before


def another_tokenizer(folder: Path) -> None:
    """The same file with its special tokens gone, as a tokenizer of another model has."""
    data = json.loads((folder / TOKENIZER).read_text())
    data["added_tokens"] = []
    (folder / TOKENIZER).write_text(json.dumps(data))


def longer_tokenizer(folder: Path) -> None:
    data = json.loads((folder / TOKENIZER).read_text())
    last = max(data["added_tokens"], key=lambda token: token["id"])
    data["added_tokens"] += [{**last, "id": last["id"] + 1, "content": "<|extra|>"}]
    (folder / TOKENIZER).write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "what"),
    [(another_tokenizer, "does not know|are missing"), (longer_tokenizer, "knows 1025 tokens, the model 1024")],
)
def test_a_tokenizer_of_another_model(workshop, bundles, tmp_path, change, what):
    test_checkpoints(workshop, bundles, tmp_path, change, what, TOKENIZER, "original checkpoint", 2)


def test_a_weight_that_is_no_number_cannot_be_rounded(bundles, tmp_path):
    before = published(bundles)
    small_scout(tmp_path / "text", vision=False)

    def spoil(held: dict[str, Any]) -> None:
        held["model.layers.0.self_attn.q_proj.weight"][3, 5] = float("nan")

    tensors("nan", spoil)(tmp_path / "text")
    build_file = write_build(tmp_path / "build.yaml", Path("text"), "text", ("int8",), output=str(bundles))
    check(arriero("build", build_file), "not finite|NaN", "layers.0.self_attn.q_proj.weight", "fp32|checkpoint")
    assert published(bundles) == before


# --- the bundle


def target_of_int8(folder: Path) -> None:
    """The graph of another target, which would read the weights as what they are not."""
    shutil.copyfile(folder.parent / "good" / "int8" / "text.onnx", folder / "text.onnx")


MANIFEST, PARITY = "manifest.json", "parity.json"
WEIGHTS = "weights/text.safetensors"
COPY = "Copy the bundle again"
BUNDLES = [
    case(content("manifest_missing", MANIFEST, None), "no manifest.json", "fp32", "arriero build"),
    case(cut("manifest_truncated", MANIFEST, 0.4), "not valid JSON", MANIFEST, COPY),
    case(content("manifest_no_object", MANIFEST, b"[]"), "not a JSON object", MANIFEST, COPY),
    case(setting("format_of_tomorrow", MANIFEST, format=2), "format 2", MANIFEST, "arriero that built it"),
    case(setting("key_missing", MANIFEST, files=...), "keys are missing: files", MANIFEST, COPY),
    case(setting("target_key_missing", MANIFEST, **{"target.context": ...}), "'context' is missing", "manifest.json:target", COPY),
    case(setting("model_misshapen", MANIFEST, **{"model.text": 5}), "wrong shape", "manifest.json:model", "Rebuild"),
    case(setting("shown_key_missing", MANIFEST, weights=...), "manifest", "manifest.json:chain.artifact", COPY),
    case(setting("context_edited", MANIFEST, **{"target.context": 999}), "manifest", "manifest.json:chain.artifact", COPY),
    case(setting("chain_edited", MANIFEST, **{"chain.profile": "0" * 64}), "broken", "manifest.json:chain.artifact", COPY),
    case(setting("checkpoint_edited", MANIFEST, **{"chain.checkpoint": "0" * 64}), "broken", "manifest.json:chain.graph", COPY),
    case(setting("chain_shortened", MANIFEST, **{"chain.parity": ...}), "incomplete", "manifest.json:chain", COPY),
    case(setting("chain_no_object", MANIFEST, chain="sound"), "incomplete", "manifest.json:chain", COPY),
    case(setting("another_processor", MANIFEST, **{"target.arch": "riscv64"}), "built for riscv64", "manifest.json:target.arch", "Build a target", 3),
    case(setting("file_outside", MANIFEST, **{"files.": {"bytes": 1, "sha256": "0"}}), "broken", "manifest.json:chain", COPY),
    case(cut("weights_cut", WEIGHTS, 0.5), "incomplete", WEIGHTS, COPY),
    case(flip("weights_flipped", WEIGHTS, 0.8), "changed or damaged", WEIGHTS, COPY),
    case(content("weights_missing", WEIGHTS, None), "missing from the bundle", WEIGHTS, COPY),
    case(target_of_int8, "another build|damaged", "text.onnx", COPY),
    case(flip("tokenizer_changed", "tokenizer/tokenizer.json", 0.5), "changed or damaged", "tokenizer/tokenizer.json", COPY),
    case(content("tokenizer_gone", "tokenizer/tokenizer.json", None), "missing", "tokenizer/tokenizer.json", COPY),
    case(setting("report_edited", PARITY, passed=False), "changed|incomplete", PARITY, COPY),
]  # fmt: skip


@pytest.mark.parametrize("verb", ["run", "inspect", "parity"])
@pytest.mark.parametrize(("change", "what", "where", "remedy", "code"), BUNDLES)
def test_bundles(workshop, tmp_path, verb, change, what, where, remedy, code):
    bundle = tmp_path / "fp32"
    shutil.copytree(workshop / "bundles" / "fp32", bundle)
    (tmp_path / "good").symlink_to(workshop / "bundles")
    change(bundle)
    check(arriero(verb, bundle, *([PROMPT] if verb == "run" else [])), what, where, remedy, code)


@pytest.mark.parametrize("verb", ["run", "inspect", "parity"])
@pytest.mark.parametrize("name", ["nothing", "fp32.partial"])
def test_what_is_no_bundle(tmp_path, verb, name):
    if name == "fp32.partial":
        (tmp_path / name).mkdir()
    refused = arriero(verb, tmp_path / name, *([PROMPT] if verb == "run" else []))
    check(refused, "no such bundle|no manifest.json", name, "Check the path|run `arriero build` again")


# --- the question


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)).save(folder / "good.png")
    whole = (folder / "good.png").read_bytes()
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("not a picture")
    (folder / "empty.jpg").write_bytes(b"")
    damaged = bytearray(whole)
    damaged[60:90] = bytes(30)
    (folder / "damaged.png").write_bytes(damaged)
    return folder


@pytest.mark.parametrize(
    ("arguments", "what", "where", "remedy"),
    [
        pytest.param(["x", "--image", "truncated.png"], "truncated", "truncated.png", "complete copy", id="truncated"),
        pytest.param(["x", "--image", "damaged.png"], "corrupt|not a readable", "damaged.png", "c", id="damaged"),
        pytest.param(["x", "--image", "text.png"], "not a readable image", "text.png", "is an image", id="no-image"),
        pytest.param(["x", "--image", "empty.jpg"], "not a readable image", "empty.jpg", "is an image", id="empty"),
        pytest.param(["x", "--image", "gone.png"], "no such image", "gone.png", "Check the path", id="no-file"),
        pytest.param(["x", "--image", "."], "not a readable image", r"images", "is an image", id="folder"),
        pytest.param(["<|image|> or <|image|>?", "--image", "good.png"], "2 image placeholders and 1", "prompt", "Give one image per", id="too-few-images"),
        pytest.param(["<|image|>?"], "1 image placeholders and 0", "prompt", "Give one image per", id="no-images"),
        pytest.param(["<|patch|>"], "placeholder", "ids|prompt", "", id="model-s-own-placeholder"),
        pytest.param([""], "prompt is empty", "prompt", "Ask", id="empty-prompt"),
        pytest.param(["-"], "prompt is empty", "prompt", "Ask", id="empty-standard-input"),
        pytest.param(["what " * 3000], "exceed the context", "at most 1024", "Shorten the prompt", id="too-long"),
        pytest.param(["x", "--max-tokens", "1024"], "exceed the context", "at most 1024", "lower max_tokens", id="answer-too-long"),
        pytest.param(["x", "--top-p", "1.5"], "top_p is 1.5", "top_p", "at most 1", id="top-p"),
        pytest.param(["x", "--top-p", "nan"], "top_p is nan", "top_p", "at most 1", id="top-p-nan"),
        pytest.param(["x", "--temperature", "nan"], "temperature is nan", "temperature", "at least 0", id="temperature"),
        pytest.param(["x", "--temperature", "-1"], "temperature", "-1", "x>=0", id="temperature-below"),
        pytest.param(["x", "--seed", "-1", "--temperature", "1"], "seed is -1", "seed", "at least 0", id="seed"),
        pytest.param(["x", "--stop", ""], "stop text is empty", "stop", "one character", id="stop"),
        pytest.param(["x", "--max-tokens", "0"], "max-tokens", "0", "x>=1", id="no-tokens"),
        pytest.param(["x", "--threads", "many"], "threads", "many", "integer", id="threads"),
    ],
)  # fmt: skip
def test_questions(workshop, images, monkeypatch, arguments, what, where, remedy):
    monkeypatch.chdir(images)
    check(arriero("run", workshop / "bundles" / "fp32", *arguments), what, where, remedy)


def test_a_report_that_cannot_be_written(workshop, tmp_path):
    (tmp_path / "file").touch()
    refused = arriero("parity", workshop / "bundles" / "fp32", "--junit", tmp_path / "file" / "parity.xml")
    check(refused, "cannot be written", "parity.xml", "a path that can be written")
    check(arriero("parity", workshop / "bundles" / "fp32", "--html", tmp_path), "cannot be written", "", "path")


@pytest.mark.parametrize("against", ["gone", "scout/config.json"])
def test_parity_against_no_checkpoint(workshop, against):
    refused = arriero("parity", workshop / "bundles" / "fp32", "--against", workshop / against)
    check(refused, "no such folder|is a file", against, "Give the folder")
