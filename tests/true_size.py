"""The released models at their true size and without their weights: headers, an index, and files that are all holes."""

from __future__ import annotations

import json
import math
from pathlib import Path

from arriero.graphs.config import ModelConfig
from arriero.graphs.names import expected_tensors
from tests.released import released

SHARD = 5 << 30  # bytes, as the released files are divided


def write_headers(folder: Path, name: str, tokenizer: str) -> Path:
    """Write the released model `name` into `folder`: true config and headers, no byte of weights; `tokenizer` as is."""
    from arriero.graphs.sources.llama4_defaults import default_side_files

    folder.mkdir(parents=True)
    data = released(name)
    (folder / "config.json").write_text(json.dumps(data))
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    for file, text in default_side_files(data["vision_config"]).items():
        (folder / file).write_text(text, encoding="utf-8")
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = SHARD
    for tensor, shape in expected_tensors(ModelConfig.from_dict(data, "config.json")).items():
        size = 2 * math.prod(shape)
        if size > room and shards[-1]:
            shards.append({})
            room = SHARD
        shards[-1][tensor] = shape
        room -= size
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for file, shard in zip(names, shards, strict=True):
        _write_shard(folder / file, shard)
    weight_map = {tensor: file for file, shard in zip(names, shards, strict=True) for tensor in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def _write_shard(path: Path, shard: dict[str, tuple[int, ...]]) -> None:
    header, end = {}, 0
    for tensor, shape in shard.items():
        start, end = end, end + 2 * math.prod(shape)
        header[tensor] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
