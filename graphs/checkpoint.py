"""A Llama 4 checkpoint: its config, and a source of rows for every tensor, whatever its layout on disk.

`Checkpoint.open` refuses a folder whose files contradict each other (headers, shards, index), all findings at once.
`sources.ledger` then compares the tensors with what the config says must be there.
"""

from __future__ import annotations

import difflib
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arriero.errors import ArrieroError
from arriero.graphs.sources.content_hash import content_hash, known_content_hash
from arriero.graphs.sources.hugging_face import TEXT_ONLY, open_folder, read_config
from arriero.graphs.sources.weight_source import WeightSource

if TYPE_CHECKING:
    import torch

SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/default.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)
"""Files beside the weights which a bundle takes over, so that a change in one is a change of the checkpoint."""

LICENSE_FILES = ("LICENSE*", "USE_POLICY*", "NOTICE*")
"""Patterns of the files that Llama's licence asks to go with every copy; a bundle takes them over as well."""

TORCH_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "BF16": "bfloat16",
    "F16": "float16",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
}


class Checkpoint:
    """A sound checkpoint: `config` (config.json as a dict) and `tensors` (canonical name -> `WeightSource`)."""

    def __init__(
        self, folder: Path, config: dict[str, Any], tensors: dict[str, WeightSource], weight_files: list[Path]
    ) -> None:
        self.folder, self.config, self.tensors = folder, config, tensors
        self._weight_files = weight_files

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Open `folder`. Raises as the layout's module does."""
        folder = Path(folder)
        config = read_config(folder)
        return cls(folder, config, *open_folder(folder, config))

    @property
    def text_only(self) -> bool:
        """Whether this is a `Llama4ForCausalLM`: no vision tower, no projector."""
        return bool(self.config["model_type"] == TEXT_ONLY)

    @property
    def files(self) -> list[Path]:
        """Every file of the checkpoint that the export reads, sorted by name."""
        beside = {self.folder / name for name in ("config.json", *SIDE_FILES) if (self.folder / name).exists()}
        return sorted(beside | set(license_files(self.folder)) | set(self._weight_files))

    def source(self, name: str) -> WeightSource:
        """One tensor, or `ArrieroError` with the nearest name."""
        try:
            return self.tensors[name]
        except KeyError:
            near = difflib.get_close_matches(name, self.tensors, n=1)
            remedy = f"The nearest name is {near[0]}" if near else None
            raise ArrieroError(f"there is no tensor {name}", where=str(self.folder), remedy=remedy) from None

    def read(self, name: str) -> np.ndarray:
        """Give a tensor as a read-only array; bf16 as its uint16 bits, f8 as uint8 bits."""
        source = self.source(name)
        return source.rows(0, source.shape[0] if source.shape else 1)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Give rows `start:stop` of axis 0, as `read` would. Raises ValueError for rows that are not there."""
        return self.source(name).rows(start, stop)

    def read_float32(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Give a tensor, or rows `start:stop` of it, as a float32 array of its own."""
        source = self.source(name)
        return source.float32(start, (source.shape[0] if source.shape else 1) if stop is None else stop)

    def torch_tensor(self, name: str) -> torch.Tensor:
        """Give a tensor in torch, zero-copy over a read-only map: writing to it would crash the process."""
        import torch

        source = self.source(name)
        dtype = getattr(torch, TORCH_DTYPES[source.dtype])
        if source.nbytes == 0:
            return torch.empty(source.shape, dtype=dtype)
        array = self.read(name).reshape(-1)
        # Torch can view bytes as a wider dtype only where the file aligned them; the writers we know always do.
        if array.__array_interface__["data"][0] % array.itemsize:
            array = array.copy()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(array.view(np.uint8)).view(dtype).reshape(source.shape)

    def content_hash(self, memo: Path | None = None) -> str:
        """Give the sha256 over all `files`, remembered in `memo`.

        Raises `Problems` for weights that are NaN or infinite, in the files that it has to read for it.
        """
        return content_hash(self.files, memo, self.tensors.values())

    def known_content_hash(self, memo: Path) -> str | None:
        """Give `content_hash` when `memo` holds every file as it is now, else None; reads no tensor."""
        return known_content_hash(self.files, memo)


def license_files(folder: Path) -> list[Path]:
    """The licence, use policy and notices in a checkpoint's folder, sorted by name."""
    return sorted({file for pattern in LICENSE_FILES for file in folder.glob(pattern) if file.is_file()})
