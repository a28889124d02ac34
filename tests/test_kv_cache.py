"""Narrow key/value caches by the real command line: built beside profiles, described, refused without their data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import arriero as package
from arriero.runtimes.onnxruntime import OrtBackend
from tests.command import arriero, contents, write_build
from tests.conftest import workshop_profiles
from tests.small import CHUNK, small_scout

# Random routers are undecided, so that any rounding turns choices: what is asked for is that nothing breaks.
THRESHOLDS = "{router_agreement: 0.7, same_top_token: 0.7, task_accuracy_forced_drop: 1.0}"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-only build of `fp32` and `int8`, both with keys and values in int8."""
    folder = tmp_path_factory.mktemp("kv8")
    small_scout(folder / "scout", vision=False)
    file = write_build(folder / "build.yaml", Path("scout"), "text", ("fp32", "int8"), 4, THRESHOLDS)
    text = file.read_text().replace("context:", "kv_cache: int8, context:")
    file.write_text(text.replace("calibration: {samples: 4", "calibration: {samples: 24"))
    done = arriero("build", file)
    assert done.code == 0, done.err
    return folder


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-only build for TVM of `fp32` with keys and values in float16 and in int8."""
    pytest.importorskip("tvm", reason="needs apache-tvm: pip install 'arriero[tvm]'")
    folder = tmp_path_factory.mktemp("narrow")
    small_scout(folder / "scout", vision=False)
    file = write_build(folder / "build.yaml", Path("scout"), "text", ("fp32",), 24, THRESHOLDS, backend="tvm")
    (target,) = (line for line in file.read_text().splitlines() if "backend: tvm" in line)
    lines = [
        target.replace("name: fp32", f"name: {cache}").replace("context:", f"kv_cache: {cache}, context:")
        for cache in ("float16", "int8")
    ]
    file.write_text(file.read_text().replace(target, "\n".join(lines)))
    done = arriero("build", file)
    assert done.code == 0, done.err
    return folder / "bundles"


@pytest.mark.parametrize("cache", ["float16", "int8"])
def test_tvm_keeps_keys_and_values_as_the_bundle_says(compiled: Path, cache: str) -> None:
    bundle, item = compiled / cache, np.dtype(cache).itemsize
    manifest = json.loads((bundle / "manifest.json").read_text())
    text = manifest["model"]["text"]
    token = 2 * text["num_key_value_heads"] * text["head_dim"] * item
    assert manifest["target"]["kv_cache"] == cache
    assert manifest["kv_bytes_per_token"] == {"chunked": token, "global": token}
    report = json.loads((bundle / "parity.json").read_text())
    rows = {row["metric"]: row for row in report["rows"]}
    assert report["labels"]["KV cache"] == cache
    assert rows["logits_max_abs_error"]["threshold"] is None  # fp32 limits it
    assert 1e-12 < rows["logits_kl_mean"]["value"] < (1e-3 if cache == "int8" else 1e-5)
    with package.load(bundle, threads=2) as session:
        store = session.backend.new_cache(2, 1024).store  # type: ignore[attr-defined]
        assert {buffer.dtype for buffer in (*store.keys, *store.values)} == {np.dtype(cache)}
        prompts = [f"Sort {number} 3 9 1 from low to high." for number in range(3)]
        alone = [session.generate(prompt, max_tokens=3 * CHUNK).token_ids for prompt in prompts]
        together = session.generate_batch(prompts, max_tokens=3 * CHUNK)
        assert max(map(len, alone)) > CHUNK
        assert [answer.token_ids for answer in together] == alone


def test_a_saved_chat_goes_on_with_its_narrow_cache(compiled: Path, tmp_path: Path) -> None:
    with package.load(compiled / "int8", threads=1) as session:
        chat = session.chat()
        chat.send("What is 17 + 25?", max_tokens=5)
        chat.save(tmp_path / "chat")
        with np.load(tmp_path / "chat") as saved:
            assert saved["key.0"].dtype == np.int8
        expected = chat.send("And 3 more?", max_tokens=9).token_ids
        assert session.load_chat(tmp_path / "chat").send("And 3 more?", max_tokens=9).token_ids == expected


def test_a_bundle_of_rounded_weights_keeps_and_says_float16_without_being_asked(tmp_path: Path) -> None:
    pytest.importorskip("tvm", reason="needs apache-tvm: pip install 'arriero[tvm]'")
    small_scout(tmp_path / "scout", vision=False)
    file = write_build(tmp_path / "build.yaml", Path("scout"), "text", ("int8",), 4, THRESHOLDS, backend="tvm")
    assert "kv_cache" not in file.read_text()
    done = arriero("build", file)
    assert done.code == 0, done.err
    (folder,) = (one.parent for one in (tmp_path / "bundles").glob("*/manifest.json"))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["target"]["kv_cache"] == "float16"
    assert json.loads((folder / "parity.json").read_text())["labels"]["KV cache"] == "float16"
    with package.load(folder, threads=1) as session:
        store = session.backend.new_cache(1, 64).store  # type: ignore[attr-defined]
        assert {buffer.dtype for buffer in (*store.keys, *store.values)} == {np.dtype("float16")}


@pytest.mark.parametrize("name", ["fp32", "int8"])
def test_a_bundle_says_how_it_keeps_keys_and_values(built: Path, name: str) -> None:
    bundle = built / "bundles" / name
    manifest = json.loads((bundle / "manifest.json").read_text())
    text = manifest["model"]["text"]
    token = 2 * text["num_key_value_heads"] * text["head_dim"]
    assert manifest["kv_bytes_per_token"] == {"chunked": token, "global": token}
    assert manifest["target"]["kv_cache"] == "int8"
    described = arriero("inspect", bundle, "--json").json
    assert (described["kv_cache"], described["kv_bytes_per_token"]["global"]) == ("int8", token)
    assert f"int8, {token} B per token and chunked layer" in " ".join(arriero("inspect", bundle).out.split())
    report = json.loads((bundle / "parity.json").read_text())
    assert report["labels"]["KV cache"] == "int8"
    rows = {row["metric"]: row for row in report["rows"]}
    assert "logits_max_abs_error" in rows
    assert rows["logits_max_abs_error"]["threshold"] is None
    assert rows["task_accuracy_forced_drop"]["threshold"] == 1.0  # the build file has the last word
    assert rows["logits_kl_mean"]["value"] > 1e-9  # the reference keeps its own keys and values in float32


def test_a_bundle_takes_a_quarter_at_run_time_and_answers_over_chunks(built: Path) -> None:
    with package.load(built / "bundles" / "fp32", threads=1) as session:
        assert isinstance(session.backend, OrtBackend)
        store = session.backend.new_cache(2, 1024).store
        assert {buffer.dtype for buffer in (*store.keys, *store.values)} == {np.dtype(np.int8)}
        prompts = [f"Sort {number} 3 9 1 from low to high." for number in range(3)]
        alone = [session.generate(prompt, max_tokens=3 * CHUNK).token_ids for prompt in prompts]
        together = session.generate_batch(prompts, max_tokens=3 * CHUNK)
        assert max(map(len, alone)) > CHUNK
        assert [answer.token_ids for answer in together] == alone


def test_a_published_bundle_is_proven_again_under_its_own_thresholds(built: Path) -> None:
    told = arriero("parity", built / "bundles" / "int8", "--against", built / "scout", "--samples", "2", "--json")
    assert told.code == 0, told.err
    assert told.json["labels"]["KV cache"] == "int8"


@pytest.mark.parametrize("seed", [11, 12])
def test_scales_from_too_few_tokens_are_refused(workshop: Path, tmp_path: Path, seed: int) -> None:
    """With the workshop's seed, calibration is done already, for targets that did not ask for scales."""
    shutil.copytree(workshop / "bundles", tmp_path / "bundles")
    before = contents(tmp_path / "bundles" / "fp32")
    file = write_build(tmp_path / "build.yaml", workshop / "scout", profiles=workshop_profiles(workshop), samples=8)
    text = file.read_text().replace("profile: fp32,", "profile: fp32, kv_cache: int8,")
    file.write_text(text.replace("seed: 11", f"seed: {seed}"))
    refused = arriero("build", file)
    assert refused.code == 2
    told = " ".join(refused.err.split())
    assert "calibration tokens are too few for the scales of an int8 key/value cache" in told
    assert "Raise calibration.samples, or write `kv_cache: float32`" in told
    assert contents(tmp_path / "bundles" / "fp32") == before
