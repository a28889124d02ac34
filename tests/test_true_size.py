"""Scout, Maverick and Llama Guard 4 at their true size, planned from their headers alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command import arriero
from tests.released import released
from tests.true_size import write_headers

llama_models = pytest.importorskip("llama_models", reason="needs the package llama-models, of the extra `test`")

BUILD = """version: 1
model: nothing-here-yet
modalities: [text]
targets:
  - {name: small, backend: tvm, profile: int4, context: 8192}
calibration: {set: samples.jsonl}
"""
PARAMETERS = {"scout": 108_641_793_536, "maverick": 401_583_781_376, "guard": 12_001_097_216}


def bundle_bytes(name: str) -> float:
    """What `int4` makes of a released model: a float16 scale for 32 weights, of experts for 64; the head in int8."""
    text = released(name)["text_config"]
    hidden, layers, experts = text["hidden_size"], text["num_hidden_layers"], text["num_local_experts"]
    heads, kv_heads, size = text["num_attention_heads"], text["num_key_value_heads"], text["head_dim"]
    step = text["interleave_moe_layer_step"]
    moe = layers // step if experts else 0
    attention = layers * hidden * size * (2 * heads + 2 * kv_heads)
    wide = 3 * hidden * text["intermediate_size"]
    dense = (layers - moe) * 3 * hidden * text["intermediate_size_mlp"]
    four_bits = (attention + dense + moe * wide) * (4 + 16 / 32) + moe * experts * wide * (4 + 16 / 64)
    table = text["vocab_size"] * hidden
    router, norms = moe * experts * hidden, (2 * layers + 1) * hidden
    return four_bits / 8 + table * 8.5 / 8 + 2 * table + 2 * router + 4 * norms


@pytest.fixture(scope="module")
def tokenizer() -> str:
    """Meta's own, since a tokenizer has to know the model's closing tokens."""
    from arriero.graphs.sources.meta_tokenizer import read_meta_tokenizer

    return read_meta_tokenizer(Path(llama_models.__file__).parent / "llama4" / "tokenizer.model")


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_released_model_is_planned_from_its_headers(tmp_path: Path, tokenizer: str, name: str) -> None:
    folder = write_headers(tmp_path / "model", name, tokenizer)
    (tmp_path / "nothing-here-yet").mkdir()
    (tmp_path / "samples.jsonl").write_text('{"prompt": "What is it?", "answer": "it"}\n' * 8)
    (tmp_path / "build.yaml").write_text(BUILD)
    done = arriero("plan", tmp_path / "build.yaml", "--model", folder, "--json")
    assert done.code in (0, 3), done.err  # 3: of memory or disk there is too little, on most machines
    plan = json.loads(done.out)
    assert plan["model"]["parameters"] == PARAMETERS[name]
    assert plan["targets"][0]["weights_bytes"] == bundle_bytes(name)
    held = sum(file.stat().st_blocks * 512 for file in folder.glob("*.safetensors"))
    assert held < 16 << 20, "the plan needs no weights"
