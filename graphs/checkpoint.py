"""A Llama 4 checkpoint: its config, and a source of rows for every tensor, whatever its layout on disk.

`Checkpoint.open` refuses a folder whose files contradict each other (headers, shards, index), all findings at once.
`sources.ledger` then compares the tensors with what the config says must be there.
"""

from __future__ import annotations

import difflib
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arriero.errors import ArrieroError
from arriero.graphs.config import ModelConfig
from arriero.graphs.sources.adapters import merge_adapters
from arriero.graphs.sources.content_hash import content_hash, known_content_hash, remember_links
from arriero.graphs.sources.layout import SIDE_FILES, Layout
from arriero.graphs.sources.open_layout import open_layout
from arriero.graphs.sources.synthetic import SyntheticModel
from arriero.graphs.sources.weight_source import WeightSource
from arriero.profiles.turn import turned

if TYPE_CHECKING:
    import torch

TEXT_ONLY = "llama4_text"
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
    """A sound checkpoint: `config` (config.json as a dict) and `tensors` (canonical name -> `WeightSource`).

    `model` is its folder or file, or the synthetic model that it is, `adapters` what was merged into it. To another
    process it goes as these, and is opened anew.
    """

    def __init__(self, model: Path | SyntheticModel, layout: Layout, adapters: Sequence[Path] = ()) -> None:
        self.model, self.layout, self.adapters = model, layout, (*adapters,)
        self.config, self.tensors = layout.config, layout.tensors

    @classmethod
    def open(cls, model: str | Path | SyntheticModel, adapters: Sequence[Path] = ()) -> Checkpoint:
        """Open a folder, a .gguf file or a synthetic model, with LoRA `adapters` merged in order.

        Raises as the layout's module does.
        """
        model = Path(model) if isinstance(model, str) else model
        opened = cls(model, open_layout(model))
        return opened.merged(adapters) if adapters else opened

    def merged(self, adapters: Sequence[Path]) -> Checkpoint:
        """This checkpoint with LoRA `adapters` merged in order. Raises as `Adapter.read` does."""
        tensors, files = merge_adapters(self.tensors, adapters)
        weight_files = [*self.layout.weight_files, *files]
        layout = replace(self.layout, tensors=tensors, weight_files=weight_files)
        return Checkpoint(self.model, layout, (*self.adapters, *adapters))

    def __reduce__(self) -> tuple[Any, tuple[Path | SyntheticModel, tuple[Path, ...]]]:
        return Checkpoint.open, (self.model, self.adapters)

    @property
    def text_only(self) -> bool:
        """Whether this is a `Llama4ForCausalLM`: no vision tower, no projector."""
        return bool(self.config["model_type"] == TEXT_ONLY)

    @property
    def side_folder(self) -> Path:
        """The folder of tokenizer, processor settings and chat template: the checkpoint's own, or one made for it."""
        return Path(self._made.name) if self.layout.side is None else self.layout.side

    @cached_property
    def _made(self) -> tempfile.TemporaryDirectory[str]:
        """The side files that the layout makes, in a folder that goes with the checkpoint."""
        folder = tempfile.TemporaryDirectory(prefix="arriero-")
        for name, text in self.layout.made.items():
            file = Path(folder.name) / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(text, encoding="utf-8")
        return folder

    def model_config(self) -> ModelConfig:
        """The model that the config describes. Raises as `ModelConfig.from_dict` does."""
        return ModelConfig.of(self.config, self.side_folder, f"{self.model}/config.json")

    @property
    def files(self) -> list[Path]:
        """Every file of the checkpoint that the export reads, sorted by name; those of adapters in their order."""
        side = self.layout.side
        beside = {side / name for name in ("config.json", *SIDE_FILES)} if side is not None else set()
        there = ({file for file in beside if file.exists()} | set(self.license_files)) - set(self.layout.weight_files)
        return sorted([*there, *self.layout.weight_files], key=lambda file: file.name)

    @property
    def quantised(self) -> dict[str, tuple[int, int] | None]:
        """The tensors that are stored quantised, each with the form of its codes where a scheme of ours holds them."""
        decoded = {name: source for name, source in self.tensors.items() if source.form != source.dtype.lower()}
        return {name: None if source.codes is None else source.codes.form for name, source in decoded.items()}

    @property
    def stored_bytes(self) -> int:
        """What the files with weights take on disk."""
        return sum(file.stat().st_size for file in self.layout.weight_files)

    @property
    def license_files(self) -> list[Path]:
        """The licence, use policy and notices beside the weights, sorted by name."""
        if isinstance(self.model, SyntheticModel):
            return []
        folder = self.model if self.model.is_dir() else self.model.parent
        return sorted({file for pattern in LICENSE_FILES for file in folder.glob(pattern) if file.is_file()})

    def source(self, name: str) -> WeightSource:
        """One tensor, or `ArrieroError` with the nearest name."""
        try:
            return self.tensors[name]
        except KeyError:
            near = difflib.get_close_matches(name, self.tensors, n=1)
            remedy = f"The nearest name is {near[0]}" if near else None
            raise ArrieroError(f"there is no tensor {name}", where=str(self.model), remedy=remedy) from None

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

    def read_expert(self, name: str, expert: int) -> np.ndarray:
        """Give the matrix f32 [N, K] of one expert of the stack `name` [E, K, N]."""
        return turned(self.read_float32(name, expert, expert + 1)[0])

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

    def content_hash(self, memo: Path | None = None, progress: Callable[[int, int], None] | None = None) -> str:
        """Give the sha256 over all `files`, remembered in `memo`; `progress(bytes_done, bytes_total)` as it is read.

        Raises `Problems` for weights that are NaN or infinite, as far as files hold them as they are.
        """
        return content_hash(self.files, memo, self.tensors.values(), self.layout.made, progress)

    def known_content_hash(self, memo: Path) -> str | None:
        """Give `content_hash` when `memo` holds every file as it is now, else None; reads no tensor."""
        return known_content_hash(self.files, memo, self.layout.made)

    def remember_links(self, memo: Path) -> None:
        """Keep `memo` true of files that a build has linked, which leaves their bytes as they were."""
        remember_links(self.files, memo)
