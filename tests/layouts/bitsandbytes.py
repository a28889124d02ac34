"""Checkpoints that bitsandbytes and transformers write, and what the library makes of them again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import BitsAndBytesConfig

from tests.layouts.split_experts import load, split

PLAIN = ("lm_head", "router", "vision_model", "multi_modal_projector")
KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"quant_type": "nf4", "compress_statistics": True},
    "nf4-single": {"quant_type": "nf4", "compress_statistics": False},
    "fp4": {"quant_type": "fp4", "compress_statistics": True},
    "int8": {},
}


def write(source: Path, folder: Path, kind: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Quantise the checkpoint `source` into `folder`; gives every weight as the library reads it back, by its name."""
    model, read_back = split(load(source, dtype)), {}
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or any(part in name for part in PLAIN):
            continue
        owner, _, leaf = name.rpartition(".")
        quantised = _eight_bit(module) if kind == "int8" else _four_bit(module, KINDS[kind])
        setattr(model.get_submodule(owner), leaf, quantised)
        read_back[f"{name}.weight"] = _dequantised(quantised)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.contiguous().clone() for name, value in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    for file in source.iterdir():
        if not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
    config = json.loads((source / "config.json").read_text())
    settings = BitsAndBytesConfig(
        load_in_4bit=kind != "int8",
        load_in_8bit=kind == "int8",
        bnb_4bit_quant_type=KINDS[kind].get("quant_type", "nf4"),
        bnb_4bit_use_double_quant=KINDS[kind].get("compress_statistics", False),
    )
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings.to_dict()}, default=str))
    return {name: value for name, value in model.state_dict().items() if value.is_floating_point()} | read_back


def _four_bit(module: nn.Linear, kind: dict[str, Any]) -> nn.Module:
    made = bitsandbytes.nn.Linear4bit(module.in_features, module.out_features, bias=False, **kind)
    made.weight = bitsandbytes.nn.Params4bit(module.weight.data, requires_grad=False, **kind)
    return made.to("cpu")


def _eight_bit(module: nn.Linear) -> nn.Module:
    made = bitsandbytes.nn.Linear8bitLt(module.in_features, module.out_features, bias=False, has_fp16_weights=False)
    made.weight = bitsandbytes.nn.Int8Params(module.weight.data, requires_grad=False, has_fp16_weights=False)
    return made.to("cpu")


def _dequantised(module: Any) -> torch.Tensor:
    """The weight in float32, by the library's own functions."""
    weight = module.weight
    if isinstance(module, bitsandbytes.nn.Linear8bitLt):
        return bitsandbytes.functional.int8_vectorwise_dequant(weight.data, weight.SCB)
    weight.quant_state.dtype = torch.float32
    return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
