"""A NaN among what a checkpoint stores of one matrix, whatever its layout: in its values, or in what scales them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

MATRIX = "language_model.model.layers.1.feed_forward.experts.down_proj"
UNUSED = ("input_scale", "output_scale")  # of activations, which no value of a weight depends on
# Where a block of a GGUF type has its f16 scale.
SCALE_AT = {"Q6_K": 208} | dict.fromkeys(("Q8_0", "Q4_0", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "IQ4_NL", "IQ4_XS"), 0)


def spoiled(source: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """Copies of the checkpoint `source` in `folder`, each with one part of `MATRIX` spoiled, and that part's name."""
    for number, part in enumerate(_parts(source)):
        copy = folder / str(number)
        shutil.copytree(source, copy)
        _spoil(copy, part)
        yield part, copy


def _parts(source: Path) -> list[str]:
    if any(source.glob("*.gguf")):
        return ["blk.1.ffn_down_exps.weight"]
    if any(source.glob("*.pth")):
        return ["layers.1.feed_forward.experts.moe_w_out_eF_D"]
    stored = _load(source)
    stack = MATRIX.removeprefix("language_model.model")
    one = stack.replace(".experts.", ".experts.3.")
    own = [name for name in stored if (stack in name or one in name) and not name.endswith(UNUSED)]
    # scales of MX formats are bytes
    return [name for name in own if stored[name].is_floating_point() or name.endswith("weight_scale")]


def _load(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def _spoil(folder: Path, part: str) -> None:
    if any(folder.glob("*.gguf")):
        _spoil_gguf(next(folder.glob("model*.gguf")), part)
        return
    shards = sorted(folder.glob("*.pth"))
    if shards:
        held = torch.load(shards[-1], weights_only=False)
        held[part][-1, -1] = float("nan")
        torch.save(held, shards[-1])
        return
    from safetensors.torch import save_file

    stored = _load(folder)
    value = stored[part]
    if value.dtype in (torch.uint8, torch.float8_e4m3fn):
        value.view(torch.uint8).reshape(-1)[-1] = 0xFF
    elif part.endswith("quant_map"):
        value.fill_(float("nan"))  # no matrix need have the last code
    else:
        value.reshape(-1)[-1] = float("nan")
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


def _spoil_gguf(file: Path, part: str) -> None:
    from gguf import GGUFReader

    tensor = next(tensor for tensor in GGUFReader(file).tensors if tensor.name == part)
    at = int(tensor.data_offset) + SCALE_AT.get(tensor.tensor_type.name, 0)
    nan = np.uint16(0x7FC0 if tensor.tensor_type.name == "BF16" else 0x7E00)
    with file.open("r+b") as stream:
        stream.seek(at)
        stream.write(nan.tobytes())
