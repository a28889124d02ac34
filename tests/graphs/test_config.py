"""config.json against transformers' own configuration classes: what is taken, what is refused, and what it means."""

import logging

import pytest

from arriero.errors import ArrieroError, Problems
from arriero.graphs.config import ModelConfig
from tests.graphs.test_model import SCOUT, VISION

transformers = pytest.importorskip("transformers")

VALUES = [
    None,
    True,
    False,
    "false",
    "x",
    0,
    1,
    4,
    -1,
    1.0,
    0.25,
    float("nan"),
    float("inf"),
    [],
    [1],
    [True] * 4,
    [1, 1, 1, 0],
    [1, 1, 1, 0, 1],
    [0.0] * 4,
    ["full_attention"] * 4,
    ["chunked_attention"] * 5,
    {},
    {"rope_type": "default"},
    {"rope_type": "llama3"},
]
TEXT = {**SCOUT, "num_hidden_layers": 4}
KEYS = sorted(transformers.Llama4TextConfig.__annotations__.keys() - {"base_model_tp_plan", "model_type"})
VISION_KEYS = sorted(transformers.Llama4VisionConfig.__annotations__.keys() - {"base_model_tp_plan", "model_type"})
ROOT_KEYS = ["boi_token_index", "eoi_token_index", "image_token_index", "tie_word_embeddings"]
# Where the first Llama 4 configuration had a number and today's class refuses it.
OURS_ALONE = {("attn_temperature_tuning", "4")}


@pytest.fixture(autouse=True)
def quiet():
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    yield
    logging.disable(before)


def config_with(section=None, **changes):
    data = {"model_type": "llama4", "text_config": dict(TEXT), "vision_config": dict(VISION), "image_token_index": 300}
    (data if section is None else data[section]).update(changes)
    return data


def judge(data):
    """transformers' reading of a config.json, None where it refuses it."""
    try:
        return transformers.Llama4Config.from_dict(data)
    except Exception:  # it has no one kind of error for them
        return None


def read(data):
    try:
        return ModelConfig.from_dict(data, "config.json")
    except ArrieroError:
        return None


def derived(config):
    """What both sides make of the keys, as plain values."""
    text, vision = config.text_config, config.vision_config
    rope = text.rope_parameters
    scaled = rope["rope_type"] == "llama3"
    return {
        "text": [text.vocab_size, text.hidden_size, text.intermediate_size, text.intermediate_size_mlp, text.head_dim],
        "heads": [text.num_attention_heads, text.num_key_value_heads, text.num_local_experts, text.num_experts_per_tok],
        "layers": [
            (bool(text.no_rope_layers[i]), text.layer_types[i] == "chunked_attention", i in text.moe_layers)
            for i in range(text.num_hidden_layers)
        ],
        "chunk": text.attention_chunk_size if "chunked_attention" in text.layer_types else None,
        "rope": [rope["rope_type"], rope["rope_theta"], *(rope[k] for k in ROPE if scaled)],
        "norm": [text.rms_norm_eps, text.use_qk_norm, text.tie_word_embeddings, text.max_position_embeddings],
        "tuning": [text.attn_temperature_tuning, text.floor_scale, text.attn_scale],
        "vision": [vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads, vision.intermediate_size],
        "tiles": [vision.num_channels, vision.image_size, vision.patch_size, vision.pixel_shuffle_ratio],
        "adapter": [vision.projector_input_dim, vision.projector_output_dim, vision.rope_parameters["rope_theta"]],
        "image": config.image_token_index,
    }


ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def ours(config):
    text, vision, rope = config.text, config.vision, config.text.rope
    scaled = [rope.factor, rope.low_freq_factor, rope.high_freq_factor, rope.original_context]
    chunked = any(layer.chunked for layer in text.layers)
    return {
        "text": [text.vocab_size, text.hidden_size, text.expert_ffn, text.dense_ffn, text.head_dim],
        "heads": [text.heads, text.kv_heads, text.experts, text.experts_per_token],
        "layers": [(layer.rope, layer.chunked, layer.moe) for layer in text.layers],
        "chunk": text.chunk if chunked else None,
        "rope": [rope.type, rope.theta, *(scaled if rope.type == "llama3" else [])],
        "norm": [text.rms_norm_eps, text.qk_norm, text.tied_embeddings, text.max_positions],
        "tuning": [text.temperature_tuning, text.floor_scale, text.attn_scale],
        "vision": [vision.hidden_size, vision.layers, vision.heads, vision.ffn],
        "tiles": [vision.channels, vision.image_size, vision.patch_size, vision.shuffle],
        "adapter": [vision.adapter_in, vision.adapter_out, vision.rope_theta],
        "image": config.image_token_id,
    }


CHANGES = [
    *(("text_config", key) for key in [*KEYS, "rope_theta", "rope_scaling"]),
    *(("vision_config", key) for key in [*VISION_KEYS, "rope_theta"]),
    *((None, key) for key in ROOT_KEYS),
]


@pytest.mark.parametrize(("section", "key"), CHANGES, ids=[f"{section}.{key}" for section, key in CHANGES])
def test_what_transformers_refuses_is_refused_and_what_is_taken_means_the_same(section, key):
    for value in VALUES:
        data = config_with(section, **{key: value})
        mine, theirs = read(data), judge(data)
        if theirs is None:
            assert mine is None or (key, repr(value)) in OURS_ALONE, f"{key}: {value!r} is refused by transformers"
        elif mine is not None and not (key == "attention_chunk_size" and value is None):
            assert ours(mine) == derived(theirs), f"{key}: {value!r}"


@pytest.mark.parametrize("key", KEYS)
def test_a_key_that_is_left_out_means_what_it_means_in_transformers(key):
    data = config_with()
    del data["text_config"]["rope_parameters"]
    data["text_config"].pop(key, None)
    if read(data) is not None:
        assert ours(read(data)) == derived(judge(data))


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        ("text_config", {"moe_layers": []}),
        ("text_config", {"moe_layers": [1, 3]}),
        ("text_config", {"no_rope_layers": []}),
        ("text_config", {"no_rope_layers": [0, 1, 1, 0]}),
        ("text_config", {"layer_types": ["full_attention"] * 3 + ["chunked_attention"]}),
        ("text_config", {"tie_word_embeddings": True}),
        (None, {"tie_word_embeddings": True}),
        ("text_config", {"rope_parameters": None, "rope_theta": 7.0}),
        ("text_config", {"rope_scaling": {"type": "llama3", **dict.fromkeys(ROPE[:3], 4.0)}, "rope_parameters": None}),
        ("text_config", {"rope_scaling": {"rope_type": "default", "rope_theta": 3.0}}),
        (None, {"image_token_id": 299}),
        ("text_config", {"attention_dropout": 0, "use_cache": False, "pad_token_id": None}),
    ],
)
def test_what_transformers_honours_is_honoured(section, changes):
    data = config_with(section, **changes)
    assert ours(ModelConfig.from_dict(data, "c")) == derived(judge(data))


def test_without_a_chunk_size_attention_is_global_everywhere():
    config = ModelConfig.from_dict(config_with("text_config", attention_chunk_size=None), "c").text
    assert not any(layer.chunked for layer in config.layers)
    assert [layer.rope for layer in config.layers] == [True, True, True, False]
    assert config.chunk == config.max_positions


@pytest.mark.parametrize(
    ("section", "changes", "sentence"),
    [
        ("text_config", {"use_qk_norm": "false"}, "text_config.use_qk_norm: 'false' is neither true nor false"),
        ("text_config", {"no_rope_layers": [1] * 52}, "text_config.no_rope_layers: 52 entries for 4 layers"),
        ("text_config", {"hidden_size": None}, "text_config.hidden_size: None is not a size"),
        ("text_config", {"num_hidden_layers": 10**12}, "num_hidden_layers: 1000000000000 is not a size"),
        ("text_config", {"rms_norm_eps": 10**400}, r"rms_norm_eps: 1000.*\.\.\. is not a number"),
        ("text_config", {"quantization_config": {"bits": 4}}, "text_config.quantization_config: the weights are"),
        (None, {"quantization_config": {"quant_method": "fp8"}}, "config.json:quantization_config"),
        ("text_config", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5"),
        ("text_config", {"head_dim": 15}, "head_dim: 15 is odd"),
        ("text_config", {"model_type": "llama"}, "text_config.model_type: 'llama'"),
        ("vision_config", {"num_channels": 1}, "vision_config.num_channels: 1"),
        (None, {"image_token_index": None}, "image_token_index: None stands for no image"),
        (None, {"image_token_index": 320}, "image_token_index: 320 is no token id.*below 320"),
    ],
)
def test_loose_values_are_refused_by_name(section, changes, sentence):
    with pytest.raises(Problems, match=sentence):
        ModelConfig.from_dict(config_with(section, **changes), "config.json")
