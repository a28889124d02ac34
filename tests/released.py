"""config.json of the released Llama 4 models, and the forms that versions of transformers save it in.

Scout, Maverick and Llama Guard 4 as the package knows them, and Scout's base model. `saved` follows what transformers
4.51.3, 4.56.2 and 5.23.0 wrote when each of them read and saved these values.
"""

from __future__ import annotations

import copy
from typing import Any

from arriero.graphs.sources.released_configs import RELEASED, released_config

TEXT_ASIDE: dict[str, Any] = {  # what the released files say besides, and a model does not compute with
    "_attn_implementation_autoset": True,
    "attention_dropout": 0.0,
    "cache_implementation": "hybrid",
    "for_llm_compressor": False,
    "initializer_range": 0.02,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "use_cache": True,
}
VISION_ASIDE: dict[str, Any] = {
    "_attn_implementation_autoset": True,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "projector_dropout": 0.0,
}
BASE = "scout base"
CHANGES: dict[str, dict[str, Any]] = {
    **{name: {} for name in RELEASED},
    BASE: {"max_position_embeddings": 262144, "eos_token_id": 200001},
}
VERSIONS = ("4.51.3", "4.56.2", "5.23.0")


def released(name: str) -> dict[str, Any]:
    """The config.json of `name`, a key of `CHANGES`."""
    data = released_config("scout" if name == BASE else name)
    data["text_config"] |= TEXT_ASIDE | CHANGES[name]
    data["vision_config"] |= VISION_ASIDE
    return data


def saved(data: dict[str, Any], version: str) -> dict[str, Any]:
    """`data` as the version of transformers saves it, one of `VERSIONS`."""
    data = copy.deepcopy(data)
    text, vision = data["text_config"], data["vision_config"]
    layers = range(text["num_hidden_layers"])
    text["no_rope_layers"] = text["no_rope_layers"] or [int((layer + 1) % 4 != 0) for layer in layers]
    step = text["interleave_moe_layer_step"]
    text["moe_layers"] = text.get("moe_layers", [layer for layer in layers if step and layer % step == step - 1])
    if version != "4.51.3":
        text["layer_types"] = [("full" if rope == 0 else "chunked") + "_attention" for rope in text["no_rope_layers"]]
        for section in (data, text):
            section["dtype"] = section.pop("torch_dtype")
    if version == "5.23.0":
        scaling = text.pop("rope_scaling") or {"rope_type": "default"}
        text["rope_parameters"] = {**scaling, "rope_theta": text.pop("rope_theta")}
        vision["rope_parameters"] = {"rope_type": "default", "rope_theta": vision.pop("rope_theta")}
        text |= {
            "attn_temperature_tuning": bool(text["attn_temperature_tuning"]),  # its class refuses a number
            "no_rope_layer_interval": 4,
            "tie_word_embeddings": False,
        }
    return data | {"transformers_version": version}
