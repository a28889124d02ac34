"""Damaged bundles and impossible questions are refused: one message with what, where and what to do, no traceback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from arriero.runtimes.manifest import FORMAT
from tests.command import arriero
from tests.refusals import case, check, content, cut, flip, setting
from tests.runtimes.conftest import seal

PROMPT = "What is 17 + 25?"


def target_of_int8(folder: Path) -> None:
    """The graph of another target, which would read the weights as what they are not."""
    shutil.copyfile(folder.parent / "good" / "int8" / "text.onnx", folder / "text.onnx")


MANIFEST, PARITY = "manifest.json", "parity.json"
WEIGHTS = "weights/text-00001.safetensors"
COPY = "Copy the bundle again"
BUNDLES = [
    case(content("manifest_missing", MANIFEST, None), "no manifest.json", "fp32", "arriero build"),
    case(cut("manifest_truncated", MANIFEST, 0.4), "not valid JSON", MANIFEST, COPY),
    case(content("manifest_no_object", MANIFEST, b"[]"), "not a JSON object", MANIFEST, COPY),
    case(setting("format_of_yesterday", MANIFEST, format=1), "format 1", MANIFEST, "arriero that built it"),
    case(
        setting("format_of_tomorrow", MANIFEST, format=FORMAT + 1),
        f"format {FORMAT + 1}",
        MANIFEST,
        "arriero that built it",
    ),
    case(setting("key_missing", MANIFEST, files=...), "keys are missing: files", MANIFEST, COPY),
    case(
        setting("target_key_missing", MANIFEST, **{"target.context": ...}),
        "'context' is missing",
        "manifest.json:target",
        COPY,
    ),
    case(setting("model_misshapen", MANIFEST, **{"model.text": 5}), "wrong shape", "manifest.json:model", "Rebuild"),
    case(setting("shown_key_missing", MANIFEST, weights=...), "keys are missing: weights", MANIFEST, COPY),
    case(
        setting("context_edited", MANIFEST, **{"target.context": 999}), "manifest", "manifest.json:chain.artifact", COPY
    ),
    case(
        setting("chain_edited", MANIFEST, **{"chain.profile": "0" * 64}), "broken", "manifest.json:chain.artifact", COPY
    ),
    case(
        setting("checkpoint_edited", MANIFEST, **{"chain.checkpoint": "0" * 64}),
        "broken",
        "manifest.json:chain.graph",
        COPY,
    ),
    case(
        setting("chain_shortened", MANIFEST, **{"chain.parity": ...}),
        "'parity' is missing",
        "manifest.json:chain",
        COPY,
    ),
    case(setting("chain_no_object", MANIFEST, chain="sound"), "wrong shape", "manifest.json:chain", COPY),
    case(
        setting("another_processor", MANIFEST, **{"target.arch": "riscv64"}),
        "the manifest or its file records were changed",
        "manifest.json:chain.artifact",
        COPY,
    ),
    case(
        setting("file_outside", MANIFEST, **{"files./etc/passwd": {"bytes": 1, "sha256": "0"}}),
        "points outside",
        "manifest.json:files",
        COPY,
    ),
    case(cut("weights_cut", WEIGHTS, 0.5), "incomplete", WEIGHTS, COPY),
    case(flip("weights_flipped", WEIGHTS, 0.8), "changed or damaged", WEIGHTS, COPY),
    case(content("weights_missing", WEIGHTS, None), "missing from the bundle", WEIGHTS, COPY),
    case(target_of_int8, "another build|damaged", "text.onnx", COPY),
    case(
        flip("tokenizer_changed", "tokenizer/tokenizer.json", 0.5),
        "changed or damaged",
        "tokenizer/tokenizer.json",
        COPY,
    ),
    case(content("tokenizer_gone", "tokenizer/tokenizer.json", None), "missing", "tokenizer/tokenizer.json", COPY),
    case(setting("report_edited", PARITY, passed=False), "changed|incomplete", PARITY, COPY),
]


@pytest.mark.parametrize("verb", ["run", "inspect", "parity"])
@pytest.mark.parametrize(("change", "what", "where", "remedy", "code"), BUNDLES)
def test_bundles(workshop, tmp_path, verb, change, what, where, remedy, code):
    bundle = tmp_path / "fp32"
    shutil.copytree(workshop / "bundles" / "fp32", bundle)
    (tmp_path / "good").symlink_to(workshop / "bundles")
    change(bundle)
    refused = arriero(verb, bundle, *([PROMPT] if verb == "run" else []))
    check(refused, what, where, remedy, code)
    assert refused.out == ""


def test_a_sound_bundle_for_another_processor_is_shown_and_not_run(workshop, tmp_path):
    bundle = tmp_path / "fp32"
    shutil.copytree(workshop / "bundles" / "fp32", bundle)
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["target"]["arch"] = "riscv64"
    seal(manifest)
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    check(arriero("run", bundle, PROMPT), "built for riscv64", "manifest.json:target.arch", "Build a target", 3)
    shown = arriero("inspect", bundle)
    assert (shown.code, "arch riscv64" in " ".join(shown.out.split())) == (0, True), shown.err


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
        pytest.param(["x", "--image", "."], "not a readable image", "Is a directory", "is an image", id="folder"),
        pytest.param(
            ["<|image|> or <|image|>?", "--special-tokens", "--image", "good.png"],
            r"\d image placeholders and 1 images",
            "prompt",
            "Give one image per",
            id="too-few-images",
        ),
        pytest.param(
            ["<|image|>?", "--special-tokens"], "1 image placeholders and 0", "prompt", "Give one", id="no-images"
        ),
        pytest.param(["<|patch|>", "--special-tokens"], "placeholder", "ids|prompt", "", id="model-s-own-placeholder"),
        pytest.param([""], "prompt is empty", "prompt", "Ask", id="empty-prompt"),
        pytest.param(["-"], "prompt is empty", "prompt", "Ask", id="empty-standard-input"),
        pytest.param(["what " * 3000], "exceed the context", "at most 1024", "Shorten the prompt", id="too-long"),
        pytest.param(
            ["x", "--max-tokens", "1024"],
            "exceed the context",
            "at most 1024",
            "lower max_tokens",
            id="answer-too-long",
        ),
        pytest.param(["x", "--top-p", "1.5"], "top_p is 1.5", "top_p", "at most 1", id="top-p"),
        pytest.param(["x", "--top-p", "nan"], "top_p is nan", "top_p", "at most 1", id="top-p-nan"),
        pytest.param(
            ["x", "--temperature", "nan"],
            "Invalid value",
            "'--temperature'",
            "greater than or equal to 0",
            id="temperature",
        ),
        pytest.param(
            ["x", "--temperature", "-1"],
            "Invalid value",
            "'--temperature'",
            "greater than or equal to 0",
            id="temperature-below",
        ),
        pytest.param(["x", "--seed", "-1", "--temperature", "1"], "seed is -1", "seed", "at least 0", id="seed"),
        pytest.param(["x", "--min-p", "7"], "min_p is 7.0", "min_p", "a share from 0 to 1", id="min-p"),
        pytest.param(
            ["x", "--repetition-penalty", "0"], "repetition_penalty is 0", "repetition_penalty", "above 0", id="repeat"
        ),
        pytest.param(
            ["x", "--presence-penalty", "3"], "presence_penalty is 3", "presence_penalty", "from -2 to 2", id="presence"
        ),
        pytest.param(
            ["x", "--stop-token-id", "99999"], "the token 99999", "stop_token_ids", "an id below", id="stop-id"
        ),
        pytest.param(["x", "--logprobs", "2"], "shown as JSON only", "--logprobs", "Add --json", id="logprobs"),
        pytest.param(["x", "--stop", ""], "stop text is empty", "stop", "one character", id="stop"),
        pytest.param(
            ["x", "--max-tokens", "0"], "Invalid value", "'--max-tokens'", "greater than or equal to 1", id="no-tokens"
        ),
        pytest.param(["x", "--threads", "many"], "Invalid value", "'--threads'", "a valid integer", id="threads"),
    ],
)
def test_questions(workshop, images, monkeypatch, arguments, what, where, remedy):
    monkeypatch.chdir(images)
    refused = arriero("run", workshop / "bundles" / "fp32", *arguments)
    check(refused, what, where, remedy)
    assert refused.out == ""


def test_a_report_that_cannot_be_written(workshop, tmp_path):
    (tmp_path / "file").touch()
    refused = arriero("parity", workshop / "bundles" / "fp32", "--junit", tmp_path / "file" / "parity.xml")
    check(refused, "cannot be written", "parity.xml", "a path that can be written")
    check(arriero("parity", workshop / "bundles" / "fp32", "--html", tmp_path), "cannot be written", "", "path")


@pytest.mark.parametrize("chosen", [("--set", "seen.jsonl"), ("--samples", "9"), ("--seed", "3")])
def test_a_choice_of_prompts_that_no_record_holds(workshop, chosen):
    refused = arriero("parity", workshop / "bundles" / "fp32", *chosen)
    check(refused, "prompts that the reference record does not hold", chosen[0], "Add --against")


@pytest.mark.parametrize("against", ["gone", "scout/config.json"])
def test_parity_against_no_checkpoint(workshop, against):
    refused = arriero("parity", workshop / "bundles" / "fp32", "--against", workshop / against)
    check(refused, "there is no folder|is a file", against, "Relative paths start at|Write the folder")
