"""Transformers models as quantising tools take them: every expert a module of linear layers of its own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Llama4ForCausalLM, Llama4ForConditionalGeneration

KINDS = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Expert(nn.Module):
    """One expert's matrices, called as tools call them."""

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        super().__init__()
        width = down.shape[0]
        for name, values in (("gate", gate_up[:, :width]), ("up", gate_up[:, width:]), ("down", down)):
            linear = nn.Linear(*values.shape, bias=False, dtype=values.dtype)
            linear.weight = nn.Parameter(values.T.contiguous(), requires_grad=False)
            self.add_module(f"{name}_proj", linear)


def load(folder: Path, dtype: torch.dtype) -> Any:
    """The model of a checkpoint folder, by transformers."""
    kind = (
        Llama4ForConditionalGeneration if "vision_config" in (folder / "config.json").read_text() else Llama4ForCausalLM
    )
    return kind.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)


def split(model: Any) -> Any:
    """The model with its experts one by one; it can be saved and not run."""
    text = getattr(model, "language_model", model)
    for layer in text.model.layers:
        if hasattr(layer.feed_forward, "experts"):
            stacks = layer.feed_forward.experts
            experts = zip(stacks.gate_up_proj.data, stacks.down_proj.data, strict=True)
            layer.feed_forward.experts = nn.ModuleList([Expert(*one) for one in experts])
    return model


def write(source: Path, folder: Path, kind: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Write the checkpoint `source` in the dtype `kind`, expert by expert, into `folder`; gives every weight."""
    del dtype
    split(model := load(source, KINDS[kind])).save_pretrained(folder)
    for file in source.iterdir():
        if not (folder / file.name).exists() and "safetensors" not in file.name:
            shutil.copyfile(file, folder / file.name)
    return {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
