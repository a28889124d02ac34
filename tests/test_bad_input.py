"""What is truncated, corrupt or of another model is refused: one message with what, where and what to do.

Exit code 2 (3 where the machine lacks something), no traceback, and the bundles that are there stay whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.command import arriero, contents, write_build
from tests.refusals import ORIGINAL, Change, case, check, content, cut, setting
from tests.small import small_scout

Tensors = dict[str, torch.Tensor]
ROUTER = "language_model.model.layers.1.feed_forward.router.weight"
INDEX = "model.safetensors.index.json"
CONFIG, TOKENIZER, TILES = "config.json", "tokenizer.json", "preprocessor_config.json"


# --- the build file


def line(name: str, old: str, new: str) -> Change:
    def change(text: str) -> str:
        assert old in text
        return text.replace(old, new)

    change.__name__ = name
    return change


BUILD_FILES = [
    case(
        line("unknown_key", "targets:", "target:"), "unknown key", r"build.yaml:5: target\b", "Did you mean 'targets'"
    ),
    case(line("unknown_profile", "profile: fp32", "profile: int7"), "no profile 'int7'", "build.yaml:6", "int8"),
    case(line("unknown_backend", "backend: onnx", "backend: onxx"), "not valid", "build.yaml:6", "Did you mean"),
    case(
        line("text_for_a_number", "context: 1024", "context: long"),
        "'long' is not valid",
        "build.yaml:6",
        "a whole number",
    ),
    case(
        line("unknown_cache", "profile: fp32", "profile: fp32, kv_cache: fp8"),
        "'fp8' is not valid",
        "build.yaml:6",
        "'float32', 'float16' or 'int8'",
    ),
    case(line("two_of_one_name", "name: int8", "name: FP32"), "also the name", "build.yaml:7", "Rename one"),
    case(
        line("name_no_folder", "name: int8", "name: ../int8"), "cannot be a folder name", "build.yaml:7", "For example"
    ),
    case(line("no_text", "[text, image]", "[image]"), "text is missing", "build.yaml:3", "Write `modalities"),
    case(
        line("unknown_metric", "thresholds: {}", "thresholds: {same_token: 1.0}"),
        "no such parity metric",
        "build.yaml:9",
        "Did you mean 'same_top_token'",
    ),
    case(line("one_seed_for_both", "seed: 29", "seed: 11"), "also the calibration's", "build.yaml:9", "Change one"),
    case(
        line("context_beyond_the_model", "context: 1024", "context: 9999"),
        "9,999 tokens",
        r"targets\[0\].context",
        "at most 1,024",
    ),
    case(line("no_yaml", "targets:", "targets: ["), "is not YAML", "build.yaml:6", "Correct this line"),
    case(
        line("no_model_folder", "scout", "scuot"),
        "there is no folder",
        "build.yaml:2: model",
        "Did you mean|Relative paths",
    ),
    case(
        line("budget_too_small", "version: 1", "version: 1\nbudgets: {host_memory: 64MiB}"),
        "memory",
        "budgets.host_memory",
        "Raise",
    ),
]


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
    build_file = write_build(
        tmp_path / "build.yaml", tmp_path / "scout", profiles=("fp32", "int8"), output=str(bundles)
    )
    build_file.write_text(change(build_file.read_text()))
    check(arriero(verb, build_file), what, where, remedy, code)
    assert published(bundles) == before


def test_a_model_that_is_not_in_the_cache(bundles, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    build_file = write_build(tmp_path / "build.yaml", Path("x"), output=str(bundles))
    build_file.write_text(build_file.read_text().replace("model: x", "model: hf://meta-llama/Llama-4-Scout"))
    refused = arriero("build", build_file)
    check(refused, "not in the Hugging Face cache", "build.yaml:2: model", "hf download meta-llama/Llama-4-Scout", 3)


def test_parity_cases_that_do_not_fit_the_context_are_found_before_anything_is_built(workshop, tmp_path):
    build_file = write_build(tmp_path / "build.yaml", workshop / "scout", "text")
    build_file.write_text(build_file.read_text().replace("context: 1024", "context: 100"))
    check(arriero("build", build_file), r"has \d+ tokens", "recall-0", "at most 99")
    assert not (tmp_path / "bundles").exists()


def test_a_build_file_that_is_not_there(tmp_path):
    check(arriero("build", tmp_path / "build.yml"), "no such build file", "build.yml", "Write a build file")


# --- the checkpoint


def tensors(name: str, edit: Callable[[Tensors], Any]) -> Change:
    def change(folder: Path) -> None:
        held = load_file(folder / "model.safetensors")
        edit(held)
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})

    change.__name__ = name
    return change


def _shard(folder: Path) -> tuple[Path, Path]:
    """Split the weights into two shards with an index; gives the shards."""
    held = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(held)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: held[name] for name in part}, folder / file)
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


def header_broken(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[8] = ord("[")
    (folder / "model.safetensors").write_bytes(data)


def header_twice(folder: Path) -> None:
    """One name twice in the header, as no writer makes it but a merge by hand does."""
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].decode().rstrip()
    entry = f'"{ROUTER}":{json.dumps(json.loads(header)[ROUTER])}'
    header = f"{header[:-1]},{entry}}}"
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode() + data[8 + length :])


def tokenizer_of_another_model(folder: Path) -> None:
    """The same file with its special tokens gone, as a tokenizer of another model has."""
    data = json.loads((folder / TOKENIZER).read_text())
    data["added_tokens"] = []
    (folder / TOKENIZER).write_text(json.dumps(data))


def tokenizer_too_large(folder: Path) -> None:
    data = json.loads((folder / TOKENIZER).read_text())
    last = max(data["added_tokens"], key=lambda token: token["id"])
    data["added_tokens"] += [{**last, "id": last["id"] + 1, "content": "<|extra|>"}]
    (folder / TOKENIZER).write_text(json.dumps(data))


AGAIN = "again"
CHECKPOINTS = [
    case(content("config_missing", CONFIG, None), "missing", CONFIG, "Download config.json"),
    case(cut("config_truncated", CONFIG, 0.5), "is not valid JSON", r"config.json:\d+", AGAIN),
    case(
        setting("config_of_another_model", CONFIG, model_type="mixtral"),
        "'mixtral'",
        "config.json:model_type",
        "Llama 4",
    ),
    case(
        setting("rope_unknown", CONFIG, **{"text_config.rope_scaling": {"rope_type": "yarn"}}),
        "'yarn' is not supported",
        "text_config.rope_scaling.rope_type",
        "'llama3'",
    ),
    case(
        setting("size_no_number", CONFIG, **{"text_config.hidden_size": "64"}),
        "not a size",
        "text_config.hidden_size",
        "positive integer",
    ),
    case(
        setting("epsilon_no_number", CONFIG, **{"text_config.rms_norm_eps": "tiny"}),
        "not a number",
        "text_config.rms_norm_eps",
        "finite number",
    ),
    case(
        setting("layers_no_list", CONFIG, **{"text_config.moe_layers": "all"}),
        "not a list",
        "text_config.moe_layers",
        ORIGINAL,
    ),
    case(
        setting("section_no_object", CONFIG, text_config=[1]),
        r"\[1\] is not a section",
        "config.json:text_config",
        ORIGINAL,
    ),
    case(
        setting("shuffle_zero", CONFIG, **{"vision_config.pixel_shuffle_ratio": 0.0}),
        "not a share",
        "vision_config.pixel_shuffle_ratio",
        "above 0",
    ),
    case(
        setting("token_no_id", CONFIG, **{"text_config.eos_token_id": {"a": 1}}),
        "no token id",
        "eos_token_id",
        "a number",
    ),
    case(
        setting("generation_no_id", "generation_config.json", eos_token_id="</s>"),
        "no token id",
        "generation_config.json:eos",
        "a number",
    ),
    case(
        setting("activation_unknown", CONFIG, **{"text_config.hidden_act": "gelu"}),
        "'gelu'",
        "text_config.hidden_act",
        "silu",
    ),
    case(
        setting("experts_of_another_size", CONFIG, **{"text_config.num_local_experts": 8}),
        r"has shape \[4",
        "feed_forward",
        "different models",
    ),
    case(
        setting("layers_too_many", CONFIG, **{"text_config.num_hidden_layers": 5}),
        "is missing",
        "layers.4",
        "another model",
    ),
    case(cut("weights_truncated", "model.safetensors", 0.7), "truncated", "model.safetensors", AGAIN),
    case(
        cut("header_truncated", "model.safetensors", 0.001), "truncated inside its header", "model.safetensors", AGAIN
    ),
    case(header_broken, "is not valid JSON", "model.safetensors", AGAIN),
    case(
        content("weights_are_a_pointer", "model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"),
        "Git LFS pointer",
        "model.safetensors",
        "git lfs pull",
    ),
    case(header_twice, "in the header twice", ROUTER, AGAIN),
    case(tensors("tensor_missing", lambda held: held.pop(ROUTER)), "is missing", ROUTER, "Is a shard missing"),
    case(
        tensors("tensor_unknown", lambda held: held.update(extra=held[ROUTER].clone())),
        "is unknown",
        "extra",
        "config.json",
    ),
    case(
        tensors("tensor_of_another_shape", lambda held: held.update({ROUTER: held[ROUTER][:, :32].contiguous()})),
        r"shape \[4, 32\]",
        ROUTER,
        "different models",
    ),
    case(
        tensors("tensor_of_another_dtype", lambda held: held.update({ROUTER: held[ROUTER].char()})),
        "stored as I8",
        ROUTER,
        "bf16 checkpoint",
    ),
    case(shard_missing, "00002-of-00002.safetensors is missing", INDEX, "Download"),
    case(shard_truncated, "truncated", "model-00002", AGAIN),
    case(shard_of_another_download, "does not hold", INDEX, "download them together"),
    case(index_broken, "is not valid JSON", INDEX, AGAIN),
    case(two_sets_of_weights, "has both", "scout", "Remove the one"),
    case(no_weights, "no weights found", "scout", "safetensors layout"),
    case(content("tokenizer_missing", TOKENIZER, None), "tokenizer is missing", TOKENIZER, ORIGINAL),
    case(tokenizer_of_another_model, "does not know|are missing", TOKENIZER, ORIGINAL),
    case(tokenizer_too_large, "knows 1025 tokens, the model 1024", TOKENIZER, ORIGINAL),
    case(cut("tokenizer_truncated", TOKENIZER, 0.9), "cannot be read", TOKENIZER, ORIGINAL),
    case(
        content("template_broken", "chat_template.jinja", b"{% for x in %}"),
        "template is broken at line 1",
        "chat_template.jinja",
        ORIGINAL,
    ),
    case(
        content("template_no_text", "chat_template.jinja", b"\xff\xfe{}"), "not UTF-8", "chat_template.jinja", ORIGINAL
    ),
    case(
        content("tokenizer_config_broken", "tokenizer_config.json", b"{"),
        "not valid JSON",
        "tokenizer_config.json",
        ORIGINAL,
    ),
    case(content("tiles_missing", TILES, None), "image settings are missing", TILES, ORIGINAL),
    case(
        setting("tiles_of_another_size", TILES, size={"height": 48, "width": 48}),
        "48 pixels",
        f"{TILES}:size",
        ORIGINAL,
    ),
    case(setting("tiles_no_size", TILES, size=32), "size: is 32", TILES, ORIGINAL),
    case(setting("tiles_of_other_colours", TILES, image_mean=[0.5]), "image_mean: is", TILES, ORIGINAL),
    case(
        setting("patches_of_another_size", "processor_config.json", patch_size=0),
        "tokens per tile",
        "processor_config.json",
        ORIGINAL,
    ),
]


@pytest.mark.parametrize(("change", "what", "where", "remedy", "code"), CHECKPOINTS)
def test_checkpoints(workshop, bundles, tmp_path, change, what, where, remedy, code):
    before = published(bundles)
    shutil.copytree(workshop / "scout", tmp_path / "scout")
    change(tmp_path / "scout")
    build_file = write_build(tmp_path / "build.yaml", Path("scout"), profiles=("fp32", "int8"), output=str(bundles))
    check(arriero("build", build_file), what, where, remedy, code)
    assert published(bundles) == before


def test_a_weight_that_is_no_number_is_found_while_it_is_read(bundles, tmp_path):
    before = published(bundles)
    small_scout(tmp_path / "text", vision=False)

    def spoil(held: Tensors) -> None:
        held["model.layers.0.self_attn.q_proj.weight"][3, 5] = float("nan")

    tensors("nan", spoil)(tmp_path / "text")
    build_file = write_build(tmp_path / "build.yaml", Path("text"), "text", ("int8",), output=str(bundles))
    check(arriero("build", build_file), "is NaN", "layers.0.self_attn.q_proj.weight .*at \\[3, 5\\]", "Download")
    assert published(bundles) == before
