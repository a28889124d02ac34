"""Checkpoints that compressed-tensors writes, as llm-compressor does, and what the library makes of them again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

from tests.layouts.split_experts import load, split

IGNORE = ["re:.*lm_head", "re:.*router", "re:.*vision_model.*", "re:.*multi_modal_projector.*"]
EIGHT = {"num_bits": 8, "type": "float", "symmetric": True}
SCHEMES: dict[str, dict[str, Any]] = {
    "fp8-dynamic": {**EIGHT, "strategy": "channel"},
    "fp8-tensor": {**EIGHT, "strategy": "tensor"},
    "fp8-block": {**EIGHT, "strategy": "block", "block_structure": [16, 32]},
    "w4a16": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
    "w4a16-channel": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"},
    "w4a16-asymmetric": {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32},
    "w8a16": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64},
    "w8a8": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
    "nvfp4": {
        "num_bits": 4,
        "type": "float",
        "symmetric": True,
        "strategy": "tensor_group",
        "group_size": 16,
        "scale_dtype": "torch.float8_e4m3fn",
    },
    "mxfp4": {
        "num_bits": 4,
        "type": "float",
        "symmetric": True,
        "strategy": "group",
        "group_size": 32,
        "scale_dtype": "torch.uint8",
    },
    "mxfp8": {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "group",
        "group_size": 32,
        "scale_dtype": "torch.uint8",
    },
}
ACTIVATIONS = {
    "fp8-dynamic": {**EIGHT, "strategy": "token", "dynamic": True},
    "w8a8": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
}


def write(source: Path, folder: Path, kind: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Quantise the checkpoint `source` into `folder`; gives every weight as the library reads it back, by its name."""
    model = split(load(source, dtype))
    group = {"targets": ["Linear"], "weights": SCHEMES[kind]}
    if kind in ACTIVATIONS:
        group["input_activations"] = ACTIVATIONS[kind]
    config = QuantizationConfig(config_groups={"group_0": group}, ignore=IGNORE)
    apply_quantization_config(model, config)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            _set_scales(module)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    for file in source.iterdir():
        if not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
    compressor.decompress_model(model)
    names = dict(model.named_parameters())
    return {name: value.detach().clone() for name, value in names.items() if not name.endswith(("scale", "point"))}


def _set_scales(module: Any) -> None:
    """Scales from the largest magnitudes of the weights, by the library's own rule."""
    weights, values = module.quantization_scheme.weights, module.weight.data.float()
    rows, features = values.shape
    whole = None
    if weights.strategy == "tensor":
        pieces = values.reshape(1, -1)
    elif weights.strategy == "channel":
        pieces = values
    elif weights.strategy == "block":
        high, wide = weights.block_structure
        pieces = values.reshape(rows // high, high, features // wide, wide).transpose(1, 2).flatten(2)
    else:
        pieces = values.reshape(rows, -1, weights.group_size)
    low, high_end = pieces.amin(-1), pieces.amax(-1)
    if weights.strategy == "tensor_group":
        whole = generate_gparam(values.amin().reshape(1), values.amax().reshape(1))
        module.weight_global_scale.data = whole
    scales, zeros = calculate_qparams(low, high_end, weights, whole)
    own = module.weight_scale
    own.data = scales.reshape(own.shape).to(own.dtype)
    if hasattr(module, "weight_zero_point"):
        module.weight_zero_point.data = zeros.reshape(own.shape).to(module.weight_zero_point.dtype)
