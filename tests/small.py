"""Small random checkpoints that a whole build takes: the toys with the embedded model's tokenizer and processor.

Their weights are random, so their answers are noise; what is proven with them is that every stage agrees with the
reference. A whole build takes seconds.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from arriero.models.chasqui import VOCABULARY, write_skeleton
from tests.toys import make_guard_toy, make_maverick_toy, make_scout_toy

CHASQUI, WEIGHTS = Path(__file__).parents[1] / "models" / "chasqui", "model.safetensors"
TILE = 32
CHUNK = 64  # held-out recall prompts cross it several times
CONTEXT = 1024
IMAGE_SIZE = {"height": TILE, "width": TILE}


def small_scout(folder: Path, seed: int = 5, vision: bool = True, **changes: Any) -> Path:
    """Scout's shape, multimodal, or `llama4_text` when not `vision`; `changes` override keys of the text config."""
    tokens = _copy_skeleton(folder, vision)
    make_scout_toy(folder, seed, vision, **_sizes(tokens), **changes)
    if vision:
        config = json.loads((folder / "config.json").read_text())
        config |= {key: tokens[key] for key in ("image_token_index", "boi_token_index", "eoi_token_index")}
        (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def small_maverick(folder: Path, seed: int = 6) -> Path:
    """Maverick's shape, text only: dense and MoE layers in turn, 128 experts, no QK-norm."""
    make_maverick_toy(folder, seed, **_sizes(_copy_skeleton(folder, vision=False)))
    return folder


def small_guard(folder: Path, seed: int = 7, **changes: Any) -> Path:
    """Llama Guard 4's shape, text only: two dense layers, rotary and global; `changes` override keys of the config."""
    sizes = _sizes(_copy_skeleton(folder, vision=False)) | {"attention_chunk_size": None, "num_hidden_layers": 2}
    return make_guard_toy(folder, seed, **sizes | changes)


def cut_chasqui(folder: Path, layers: int, experts: int) -> Path:
    """The embedded model's first `layers` with their first `experts`, and its whole vision tower: trained weights."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(CHASQUI, folder, ignore=shutil.ignore_patterns(WEIGHTS))
    config = json.loads((CHASQUI / "config.json").read_text())
    config["text_config"] |= {
        "num_hidden_layers": layers,
        "no_rope_layers": config["text_config"]["no_rope_layers"][:layers],
        "num_local_experts": experts,
    }
    (folder / "config.json").write_text(json.dumps(config))
    kept = {}
    for name, value in load_file(CHASQUI / WEIGHTS).items():
        layer = re.search(r"language_model\.model\.layers\.(\d+)\.", name)
        if layer is None or int(layer[1]) < layers:
            per_expert = ".experts." in name or ".router." in name
            kept[name] = value[:experts].contiguous() if per_expert else value
    save_file(kept, folder / WEIGHTS, {"format": "pt"})
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; a dotted key goes down, and the value `...` removes the key."""
    data = json.loads(path.read_text())
    for dotted, value in changes.items():
        *parents, last = dotted.split(".")
        section = functools.reduce(lambda inner, key: inner[key], parents, data)
        if value is ...:
            del section[last]
        else:
            section[last] = value
    path.write_text(json.dumps(data, indent=1))


@functools.cache
def _skeleton() -> tempfile.TemporaryDirectory[str]:
    """The embedded model's folder without weights; the tokenizer is trained once per run."""
    folder = tempfile.TemporaryDirectory(prefix="skeleton-")
    write_skeleton(Path(folder.name))
    return folder


def _copy_skeleton(folder: Path, vision: bool) -> dict[str, Any]:
    """Copy everything but the weights; gives the config.json, from which token ids are taken."""
    shutil.copytree(_skeleton().name, folder, dirs_exist_ok=True)
    if vision:
        edit_json(folder / "preprocessor_config.json", size=IMAGE_SIZE)
    else:
        (folder / "preprocessor_config.json").unlink()
        (folder / "processor_config.json").unlink()
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def _sizes(config: dict[str, Any]) -> dict[str, Any]:
    text = config["text_config"]
    ids = {key: text[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {**ids, "vocab_size": VOCABULARY, "attention_chunk_size": CHUNK, "max_position_embeddings": CONTEXT}
