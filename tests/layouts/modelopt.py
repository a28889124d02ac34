"""Checkpoints that NVIDIA Model Optimizer exports, and what its own tensor classes make of each weight again."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.layouts.split_experts import load

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor

KINDS = {"fp8": mtq.FP8_DEFAULT_CFG, "nvfp4": mtq.NVFP4_DEFAULT_CFG}


def write(source: Path, folder: Path, kind: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Quantise the checkpoint `source` into `folder`; gives every weight as the library reads it back, by its name."""
    model = load(source, dtype)
    vocabulary = model.config.get_text_config().vocab_size

    def show(model: Any) -> None:
        draw = torch.Generator().manual_seed(0)
        for _ in range(4):
            model(input_ids=torch.randint(0, vocabulary // 2, (1, 64), generator=draw))

    model = mtq.quantize(model, KINDS[kind], show)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export_hf_checkpoint(model, export_dir=str(folder))
    for file in source.iterdir():
        if not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
    stored = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    return {name: _read_back(name, stored) for name in stored if not name.endswith(("_scale", "_scale_2"))}


def _read_back(name: str, stored: dict[str, torch.Tensor]) -> torch.Tensor:
    """One weight by the library's classes, which take the inputs last."""
    value = stored[name]
    if value.dtype not in (torch.uint8, torch.float8_e4m3fn):
        return value
    turn = value.dim() == 3
    scale = stored[f"{name}_scale"] if not turn else stored[f"{name}_weight_scale"]
    packed = value.transpose(1, 2).contiguous() if turn else value
    if value.dtype == torch.float8_e4m3fn:
        whole = FP8QTensor(packed.shape, torch.float32, packed).dequantize(torch.float32, scale=scale)
    else:
        shape = torch.Size((*packed.shape[:-1], 2 * packed.shape[-1]))
        second = stored[f"{name}_scale_2"] if not turn else stored[f"{name}_weight_scale_2"]
        blocks = scale.transpose(1, 2).contiguous() if turn else scale
        whole = NVFP4QTensor(shape, torch.float32, packed).dequantize(
            torch.float32, scale=blocks, double_scale=second, block_sizes={-1: 16}
        )
    return whole.transpose(1, 2) if turn else whole
