"""Keeps the graph after each phase of a lowering as a file, so that a wrong one can be bisected."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx_ir as ir


class GraphDump:
    """Writes `<part>.<number>-<phase>.onnx` into `folder`, without weights: each is external data of its name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._numbers: Counter[str] = Counter()

    def __call__(self, part: str, phase: str, model: ir.Model) -> None:
        """Write the graph as it is now."""
        self.folder.mkdir(parents=True, exist_ok=True)
        copy = model.clone()
        for name, value in copy.graph.initializers.items():
            if value.const_value is None and value.dtype is not None and value.shape is not None:
                shape = ir.Shape([int(size) for size in value.shape.numpy()])
                value.const_value = ir.ExternalTensor(name, 0, None, value.dtype, shape=shape, name=name)
        ir.save(copy, self.folder / f"{part}.{self._numbers[part]:02}-{phase}.onnx")
        self._numbers[part] += 1
