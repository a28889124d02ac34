"""The reference against transformers, the independent judge: Scout and Maverick shapes, text and images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from arriero.errors import ArrieroError
from arriero.graphs.config import ModelConfig
from arriero.graphs.model import Llama4, StepTensors
from arriero.graphs.names import expected_tensors
from tests.toys import DENSE

transformers = pytest.importorskip("transformers")

# Relative to the largest logit: both sides are fp32 and differ only in the order of summation.
TOLERANCE = 1e-5

TEXT = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 32,
    "intermediate_size_mlp": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "attention_chunk_size": 16,
    "floor_scale": 8,
    "attn_scale": 0.3,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SCOUT = {
    **TEXT,
    "num_hidden_layers": 8,
    "num_local_experts": 16,
    "interleave_moe_layer_step": 1,
    "use_qk_norm": True,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
MAVERICK = {
    **TEXT,
    "num_hidden_layers": 4,
    "num_local_experts": 128,
    "interleave_moe_layer_step": 2,
    "use_qk_norm": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
TWO_EXPERTS = {**SCOUT, "num_experts_per_tok": 2, "num_hidden_layers": 4}
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "image_size": 32,
    "patch_size": 8,
    "pixel_shuffle_ratio": 0.5,
    "projector_input_dim": 48,
    "projector_output_dim": 48,
    "vision_output_dim": 48,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
IMAGE = 300


def judge(text: dict, vision: dict | None = VISION):
    """A transformers model with spread-out random weights (the default draw leaves routers and norms degenerate)."""
    torch.manual_seed(0)
    if vision is None:
        model = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**text))
    else:
        config = transformers.Llama4Config(
            text_config=text, vision_config=vision, image_token_index=IMAGE, boi_token_index=301, eoi_token_index=302
        )
        model = transformers.Llama4ForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.normal_(1.0, 0.2)
            else:
                fan_in = parameter.shape[-2] if parameter.dim() == 3 else parameter.shape[-1]
                parameter.normal_(0.0, (0.5 if "router" in name else 1.2) * fan_in**-0.5)
    return model.eval()


def reference(model) -> Llama4:
    """Ours, loaded strictly from the judge's weights and its config.json."""
    data = json.loads(model.config.to_json_string(use_diff=False))
    config = ModelConfig.from_dict(data, "config.json")
    prefix = "language_model." if config.text_only else ""
    ours = Llama4(config)
    ours.load_state_dict({prefix + name: value for name, value in model.state_dict().items()}, strict=True)
    return ours.eval()


def step(ours: Llama4, ids: torch.Tensor, start: int, past, features=None) -> StepTensors:
    batch, length = ids.shape
    positions = torch.arange(start, start + length).expand(batch, -1)
    held = torch.arange(start).expand(batch, -1)
    features = torch.zeros(0, ours.config.text.hidden_size) if features is None else features
    embeds = ours.embed(ids, features)
    return ours.language_model(embeds, positions, held, held, torch.arange(length), past)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error <= TOLERANCE, f"relative error {error:.2e}"


@pytest.mark.parametrize("text", [SCOUT, MAVERICK, TWO_EXPERTS], ids=["scout", "maverick", "top2"])
@torch.no_grad()
def test_prefill_across_several_chunks_in_a_batch(text):
    model = judge(text)
    ours = reference(model)
    ids = torch.randint(3, 290, (3, 57))
    result = step(ours, ids, 0, ours.language_model.empty_cache(3))
    assert_close(result.logits, model(input_ids=ids).logits)
    assert len({int(e) for e in torch.cat(result.expert_ids).flatten()}) > 4, "routing is degenerate: nothing is shown"


@pytest.mark.parametrize("text", [SCOUT, MAVERICK], ids=["scout", "maverick"])
@torch.no_grad()
def test_decode_step_by_step_equals_the_whole(text):
    model = judge(text)
    ours = reference(model)
    ids = torch.randint(3, 290, (2, 40))
    whole = model(input_ids=ids).logits
    past = ours.language_model.empty_cache(2)
    first = step(ours, ids[:, :11], 0, past)
    assert_close(first.logits, whole[:, :11])
    past = first.present
    for position in range(11, 40):
        result = step(ours, ids[:, position : position + 1], position, past)
        assert_close(result.logits[:, 0], whole[:, position])
        past = result.present


@torch.no_grad()
def test_rows_of_different_length_are_independent():
    ours = reference(judge(SCOUT))
    ids = torch.randint(3, 290, (1, 30))
    alone = step(ours, ids, 0, ours.language_model.empty_cache(1))
    short = step(ours, ids[:, :20], 0, ours.language_model.empty_cache(1))
    pad = 9  # row 1 holds 20 tokens and 9 empty slots, row 0 holds 29 tokens
    past = [
        tuple(
            torch.cat([a[:, :, :29], torch.nn.functional.pad(b, (0, 0, 0, pad))])
            for a, b in zip(long, few, strict=True)
        )
        for long, few in zip(alone.present, short.present, strict=True)
    ]
    held = torch.stack([torch.arange(29), torch.cat([torch.arange(20), torch.full((pad,), -1)])])
    positions = torch.tensor([[29], [20]])
    tokens = torch.stack([ids[0, 29:30], ids[0, 20:21]])
    embeds = ours.embed(tokens, torch.zeros(0, 64))
    both = ours.language_model(embeds, positions, held, held, torch.tensor([0]), past)
    assert_close(both.logits[0, 0], alone.logits[0, 29])
    assert_close(both.logits[1, 0], alone.logits[0, 20])


@torch.no_grad()
def test_images_several_tiles_and_several_images():
    model = judge(SCOUT)
    ours = reference(model)
    tiles = torch.randn(3, 3, 32, 32)
    ids = torch.randint(3, 290, (2, 50))
    ids[0, 5:9] = IMAGE  # a tile is (32/8)^2 * 0.5^2 = 4 tokens
    ids[0, 20:24] = IMAGE
    ids[1, 33:37] = IMAGE
    features = ours.image_features(tiles)
    assert features.shape == (12, 64)
    result = step(ours, ids, 0, ours.language_model.empty_cache(2), features)
    assert_close(result.logits, model(input_ids=ids, pixel_values=tiles).logits)


@torch.no_grad()
def test_dense_layers_without_chunks():
    """Llama Guard 4's shape. transformers makes no mask without a chunk size, so its chunk holds the whole row."""
    model = judge({**SCOUT, **DENSE, "attention_chunk_size": 512}, vision=None)
    data = json.loads(model.config.to_json_string(use_diff=False))
    config = ModelConfig.from_dict({**data, "attention_chunk_size": None}, "config.json")
    assert {(layer.rope, layer.chunked, layer.moe) for layer in config.text.layers} == {(True, False, False)}
    ours = Llama4(config)
    ours.load_state_dict({f"language_model.{name}": value for name, value in model.state_dict().items()}, strict=True)
    ids = torch.randint(3, 290, (2, 57))
    whole = model(input_ids=ids).logits
    first = step(ours, ids[:, :40], 0, ours.language_model.empty_cache(2))
    assert_close(first.logits, whole[:, :40])
    assert_close(step(ours, ids[:, 40:], 40, first.present).logits, whole[:, 40:])


@torch.no_grad()
def test_text_only_checkpoint():
    model = judge(SCOUT, vision=None)
    ours = reference(model)
    ids = torch.randint(3, 290, (1, 37))
    assert_close(step(ours, ids, 0, ours.language_model.empty_cache(1)).logits, model(input_ids=ids).logits)


def test_score_on_the_output_would_be_noticed():
    """The trap of the op: with saturated routers a score on the output looks right; our routers must not be."""
    model = judge(SCOUT)
    ours = reference(model)
    router = ours.language_model.model.layers[0].feed_forward.router
    scores = router(torch.randn(200, 64)).topk(1, dim=-1).values.sigmoid()
    assert scores.max() < 0.95


def test_expected_tensors_are_those_of_the_checkpoint():
    model = judge(MAVERICK)
    config = ModelConfig.from_dict(json.loads(model.config.to_json_string(use_diff=False)), "config.json")
    assert expected_tensors(config) == {name: tuple(value.shape) for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("section", "key", "value", "says"),
    [
        ("text_config", "hidden_act", "gelu", "hidden_act"),
        ("text_config", "num_key_value_heads", 3, "does not divide"),
        ("text_config", "rope_parameters", {"rope_type": "yarn"}, "'yarn' is not supported"),
        ("text_config", "rope_parameters", {"rope_type": "llama3", "factor": 8.0}, "without low_freq_factor"),
        ("text_config", "attention_bias", True, "attention_bias"),
        ("text_config", "hidden_size", -1, "positive integer"),
        ("text_config", "moe_layers", [99], "do not exist"),
        ("text_config", "num_experts_per_tok", 17, "of 16 experts"),
        ("vision_config", "patch_size", 7, "does not divide"),
        ("vision_config", "intermediate_size", 100, "pixel shuffle"),
    ],
)
def test_a_config_we_cannot_honour_is_refused(section, key, value, says):
    data = {"model_type": "llama4", "text_config": dict(SCOUT), "vision_config": dict(VISION)}
    data[section][key] = value
    with pytest.raises(ArrieroError, match=says) as caught:
        ModelConfig.from_dict(data, "config.json")
    assert section in str(caught.value)


def test_another_architecture_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    with pytest.raises(ArrieroError, match="'mixtral'"):
        ModelConfig.load(tmp_path)
