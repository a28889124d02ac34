"""A Llama 4 text checkpoint of 1.38 B parameters with random weights: for speed and memory, never for quality.

    python benchmarks/random_model.py bundles/mini
    python benchmarks/random_model.py bundles/tower --tower

12 layers (every fourth NoPE and global), hidden 1,024, 16 experts of 2,048 top-1 and a shared one, 16 query and 4
key/value heads of 64, vocabulary 32,000, bf16. The same seed gives the same bytes; the tokenizer is that of the
embedded model, whose vocabulary has a word for every further id, so that each token of an answer is some text. With
`--tower` it has a released model's vision tower at its true size, 0.86 B parameters, and 4 layers with 2 experts.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from safetensors.torch import save_file

from arriero.graphs.config import ModelConfig
from arriero.graphs.names import TEXT_PREFIX, expected_tensors
from arriero.graphs.sources.released_configs import released_config

CHASQUI = Path(__file__).parents[1] / "models" / "chasqui"
TOKENIZER = "tokenizer.json"
BESIDE = ("tokenizer_config.json", "chat_template.jinja")
PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"  # which a multimodal one has too
CONFIG = {
    "architectures": ["Llama4ForCausalLM"],
    "model_type": "llama4_text",
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "intermediate_size_mlp": 4096,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_local_experts": 16,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 1,
    "attention_chunk_size": 8192,
    "no_rope_layer_interval": 4,
    "use_qk_norm": True,
    "attn_temperature_tuning": True,
    "floor_scale": 8192,
    "attn_scale": 0.1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": None,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
SPREAD = 0.02


def write_model(
    folder: Path, seed: int, changes: Mapping[str, Any] | None = None, tower: Mapping[str, Any] | None = None
) -> None:
    """Write the checkpoint into the new `folder`, one file per layer and one for the rest.

    `changes` are to `CONFIG`. With `tower` it is multimodal: those are the changes to the embedded model's own.
    """
    folder.mkdir(parents=True)
    for name in BESIDE:
        shutil.copy(CHASQUI / name, folder)
    embedded = json.loads((CHASQUI / "config.json").read_text())
    ids = embedded["text_config"]
    text = CONFIG | dict(changes or {}) | {key: ids[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = text
    if tower is not None:
        config = {**embedded, "text_config": text, "vision_config": embedded["vision_config"] | dict(tower)}
        _write_picture_files(folder, config["vision_config"])
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    tokenizer = json.loads((CHASQUI / TOKENIZER).read_text())
    words = tokenizer["model"]["vocab"]
    words |= {token["content"]: token["id"] for token in tokenizer["added_tokens"]}  # else they get new ids
    # no merge leads to these words, so that no prompt has one
    words |= {f"w{token}": token for token in range(1 + max(words.values()), text["vocab_size"])}
    (folder / TOKENIZER).write_text(json.dumps(tokenizer))
    draw, files, where = torch.Generator().manual_seed(seed), {}, {}
    for name, shape in expected_tensors(ModelConfig.from_dict(config, "config.json")).items():
        parts = name.split(".")
        file = f"layer-{parts[3]}.safetensors" if "layers" in parts else "rest.safetensors"
        files.setdefault(file, {})[name.removeprefix(TEXT_PREFIX) if tower is None else name] = shape
    for file, shapes in track(files.items(), "writing", transient=True):
        values = {
            name: torch.ones(shape) if len(shape) == 1 else SPREAD * torch.randn(shape, generator=draw)
            for name, shape in shapes.items()
        }
        save_file({name: value.bfloat16() for name, value in values.items()}, folder / file, {"format": "pt"})
        where |= dict.fromkeys(shapes, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}, indent=1))


def _write_picture_files(folder: Path, tower: Mapping[str, Any]) -> None:
    """How pictures become tiles: as with the embedded model, in tiles and patches of this tower's sizes."""
    side = tower["image_size"]
    for name, changes in (
        (PREPROCESSOR, {"size": {"height": side, "width": side}}),
        (PROCESSOR, {key: tower[key] for key in ("patch_size", "pixel_shuffle_ratio")}),
    ):
        (folder / name).write_text(json.dumps(json.loads((CHASQUI / name).read_text()) | changes))


def main() -> None:
    """Parse the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder that is not there yet")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--tower", action="store_true", help="with a released model's vision tower, and few text layers"
    )
    arguments = parser.parse_args()
    if arguments.folder.exists():
        parser.error(f"{arguments.folder} is there already")
    tower = released_config("scout")["vision_config"] if arguments.tower else None
    changes = {"num_hidden_layers": 4, "num_local_experts": 2} if arguments.tower else None
    write_model(arguments.folder, arguments.seed, changes, tower)


if __name__ == "__main__":
    main()
