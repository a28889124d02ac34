"""Meta's own `ChatFormat`, and the tokenizer folder that we make where a checkpoint has only Meta's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from arriero.graphs.sources.llama4_defaults import default_side_files
from arriero.graphs.sources.meta_tokenizer import read_meta_tokenizer
from arriero.runtimes.backend import ModelSpec
from arriero.runtimes.processor.processor import Processor
from tests.runtimes.conftest import model_entry
from tests.torchvision_parts import stand_in

TILE, PATCH, SHUFFLE = 336, 14, 0.5


@pytest.fixture(scope="session")
def meta() -> Any:
    """Meta's `ChatFormat` with its tokenizer and its preprocessing."""
    pytest.importorskip("llama_models", reason="needs llama-models")
    with stand_in():
        from llama_models.llama4.chat_format import ChatFormat
    from llama_models.llama4.args import Size, VisionArgs
    from llama_models.llama4.tokenizer import Tokenizer

    vision = VisionArgs(
        image_size=Size(height=TILE, width=TILE),
        patch_size=Size(height=PATCH, width=PATCH),
        pixel_shuffle_ratio=SHUFFLE,
        dim=1,
        n_layers=1,
        n_heads=1,
        mlp_ratio=1,
        output_dim=1,
    )
    return ChatFormat(Tokenizer.get_instance(), vision)


@pytest.fixture(scope="session")
def meta_folder(meta: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer folder made of Meta's tokenizer.model, with our settings and our chat template."""
    import llama_models

    folder = tmp_path_factory.mktemp("meta")
    model = Path(llama_models.__file__).parent / "llama4" / "tokenizer.model"
    (folder / "tokenizer.json").write_text(read_meta_tokenizer(model), encoding="utf-8")
    vision = {"image_size": TILE, "patch_size": PATCH, "pixel_shuffle_ratio": SHUFFLE}
    for name, text in default_side_files(vision).items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def llama4_spec() -> ModelSpec:
    """A model with the vocabulary and the tiles of Llama 4."""
    vision = {"image_size": TILE, "patch_size": PATCH, "tokens_per_tile": 144}
    entry = model_entry(
        vision=vision, image_token_id=200092, bos_token_id=200000, eos_token_ids=[200001, 200007, 200008]
    )
    entry["text"] |= {"vocab_size": 202048, "max_position_embeddings": 100_000}
    return ModelSpec.parse(entry)


@pytest.fixture(scope="session")
def meta_processor(meta_folder: Path, llama4_spec: ModelSpec) -> Processor:
    return Processor(meta_folder, llama4_spec)
