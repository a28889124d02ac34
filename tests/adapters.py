"""LoRA adapters of random factors in the form in which PEFT saves them, for tests that do not judge their reading."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.names import TEXT_PREFIX

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def save_adapter(model: Path, folder: Path, seed: int = 1, rank: int = 4, modules: Sequence[str] = ATTENTION) -> Path:
    """Write an adapter of the linear layers called `modules` of the checkpoint `model`; gives its folder."""
    draw = np.random.default_rng(seed)
    factors = {}
    for name, source in Checkpoint.open(model).tensors.items():
        stem = name.removesuffix(".weight")
        if stem == name or stem.rpartition(".")[2] not in modules or not name.startswith(TEXT_PREFIX):
            continue
        outputs, inputs = source.shape
        module = f"base_model.model.{stem.removeprefix(TEXT_PREFIX)}"
        factors[f"{module}.lora_A.weight"] = draw.standard_normal((rank, inputs), np.float32) / math.sqrt(inputs)
        factors[f"{module}.lora_B.weight"] = draw.standard_normal((outputs, rank), np.float32) / math.sqrt(rank)
    folder.mkdir(parents=True)
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank / 2, "target_modules": list(modules)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
