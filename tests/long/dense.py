"""Builds a dense Llama 4 of Llama Guard 4's width by the command, runs it, and compares its logits to transformers'.

Two layers with random weights, hidden 5120, 40 query and 8 key/value heads, feed-forward 8192; the vocabulary is the
embedded model's. Needs 5 GB of memory and 6 GB of disk; narrower with --hidden, --heads and --ffn.

    python -m tests.long.dense FOLDER
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

import arriero as package
from tests.command import arriero, write_build
from tests.small import CONTEXT, small_guard

BACKENDS = ("onnxruntime", "tvm")
LENGTH = 48
# Relative to the largest logit, float32 on both sides in another order of sums: at the full width 9.8e-7 was measured
# for ONNX Runtime and 3.9e-6 for TVM.
TOLERANCE = 1e-5


class DenseDiffers(Exception):
    """A bundle that was not built, or that does not compute what transformers does."""


def text_config(hidden: int, heads: int, kv_heads: int, ffn: int, layers: int) -> dict[str, int]:
    """The keys of a text config of these sizes."""
    return {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "intermediate_size": ffn,
        "intermediate_size_mlp": ffn,
        "num_hidden_layers": layers,
    }


@torch.no_grad()
def judge(model: Path, ids: np.ndarray) -> np.ndarray:
    """The logits [S, V] of `ids` [S] by transformers, on the checkpoint's weights in float32."""
    import transformers

    logging.disable(logging.WARNING)
    text = json.loads((model / "config.json").read_text())
    text["attention_chunk_size"] = CONTEXT  # transformers makes no mask without one; this one holds every row
    theirs = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**text)).eval()
    theirs.load_state_dict(load_file(model / "model.safetensors"), strict=True)
    logits: np.ndarray = theirs(input_ids=torch.from_numpy(ids)[None]).logits[0].numpy()
    return logits


def run(folder: Path, backends: tuple[str, ...] = BACKENDS, **changes: Any) -> dict[str, float]:
    """The largest difference of each backend's logits, relative to the largest logit. Raises DenseDiffers.

    `changes` override keys of the small model's config.
    """
    model = small_guard(folder / "guard", **changes)
    draw = np.random.default_rng(3)
    errors = {}
    for backend in backends:
        output = folder / backend
        file = write_build(folder / f"{backend}.yaml", model, "text", samples=2, output=str(output), backend=backend)
        built = arriero("build", file)
        if built.code:
            raise DenseDiffers(f"{backend}: the build ended with code {built.code}:\n{built.err}")
        asked = arriero("run", output / "fp32", "What is 17 + 25?", "--max-tokens", "4")
        if asked.code:
            raise DenseDiffers(f"{backend}: the run ended with code {asked.code}:\n{asked.err}")
        with package.load(output / "fp32") as session:
            ids = draw.integers(3, session.spec.vocab_size - 20, LENGTH)
            ours = session.logits(ids).logits[0]
        theirs = judge(model, ids)
        errors[backend] = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
        if errors[backend] > TOLERANCE:
            raise DenseDiffers(f"{backend}: its logits are off by {errors[backend]:.2g} of the largest")
    return errors


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a new folder for the model and its builds")
    for name, value in (("hidden", 5120), ("heads", 40), ("kv-heads", 8), ("ffn", 8192), ("layers", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    sizes = vars(parser.parse_args())
    folder = sizes.pop("folder").absolute()
    folder.mkdir(parents=True)
    for backend, error in run(folder, **text_config(**sizes)).items():
        print(f"{backend}: built, proven and run; logits within {error:.2g} of transformers'")


if __name__ == "__main__":
    main()
