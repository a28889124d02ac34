"""What `<part>.json` says of an engine: its inputs, its outputs, and the shapes that each of its profiles takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arriero.errors import ArrieroError
from arriero.strict_json import read_json_object

Shape = tuple[int, ...]
REBUILD = "Rebuild the bundle with `arriero build`"
# ONNX's words -> TensorRT's, and numpy's for what crosses to the host; numpy has no bfloat16, so its bits are carried.
TYPES: dict[str, tuple[str, Any]] = {
    "FLOAT": ("FLOAT", np.float32),
    "FLOAT16": ("HALF", np.float16),
    "BFLOAT16": ("BF16", np.uint16),
    "INT64": ("INT64", np.int64),
    "INT32": ("INT32", np.int32),
    "INT8": ("INT8", np.int8),
    "UINT8": ("UINT8", np.uint8),
    "BOOL": ("BOOL", np.bool_),
}


@dataclass(frozen=True)
class Tensor:
    """One input or output; a dynamic axis has its name in place of a number."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    @property
    def numpy(self) -> np.dtype[Any]:
        """What its values are on the host."""
        return np.dtype(TYPES[self.dtype][1])

    def nbytes(self, shape: Shape) -> int:
        """Bytes of this tensor in `shape`."""
        return int(np.prod(shape, dtype=np.int64)) * self.numpy.itemsize

    def read(self, array: NDArray[Any]) -> NDArray[Any]:
        """Values from the GPU as f32 or i64, in memory of their own."""
        if self.dtype == "BFLOAT16":
            return (array.astype(np.uint32) << 16).view(np.float32)
        wide = np.float32 if array.dtype.kind == "f" else np.int64
        return array.astype(wide)


@dataclass(frozen=True)
class Profile:
    """The shapes that an engine was optimised for: of each dynamic input the least, the best and the most."""

    name: str
    ranges: dict[str, tuple[Shape, Shape, Shape]]

    def misfit(self, shapes: Mapping[str, Shape]) -> str | None:
        """Say which of `shapes` is out of this profile's range; None when all fit."""
        for name, (least, _, most) in self.ranges.items():
            shape = shapes[name]
            if len(shape) != len(least) or not all(a <= n <= b for a, n, b in zip(least, shape, most, strict=True)):
                return f"{name} is {list(shape)} and {self.name} takes {list(least)} to {list(most)}"
        return None


@dataclass(frozen=True)
class Signature:
    """An engine's inputs and outputs in order, its profiles, and how many bytes of weights the GPU keeps at most.

    `weights_on_gpu` None: all of them; the engine was not built to stream any.
    """

    where: str
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    profiles: tuple[Profile, ...]
    weights_on_gpu: int | None = None

    @classmethod
    def read(cls, path: Path) -> Signature:
        """Read `<part>.json`; what is wrong with it is an ArrieroError."""
        try:
            raw = read_json_object(path, REBUILD)
            profiles = tuple(
                Profile(str(entry["name"]), {name: _range(ends) for name, ends in entry["ranges"].items()})
                for entry in raw["profiles"]
            )
            inputs, outputs = (_tensors(raw[kind]) for kind in ("inputs", "outputs"))
            streamed = raw.get("weights_on_gpu")
            signature = cls(str(path), inputs, outputs, profiles, None if streamed is None else int(streamed))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArrieroError(
                f"the engine's signature cannot be read ({error!r})", where=str(path), remedy=REBUILD
            ) from None
        unknown = {name for profile in profiles for name in profile.ranges} - inputs.keys()
        if unknown or not profiles:
            what = f"a profile names {sorted(unknown)}, which is no input" if unknown else "the engine has no profile"
            raise ArrieroError(what, where=str(path), remedy=REBUILD)
        return signature

    def choose(self, shapes: Mapping[str, Shape]) -> int:
        """The number of the first profile that takes `shapes`. Raises ArrieroError with what does not fit."""
        misfits = []
        for number, profile in enumerate(self.profiles):
            misfit = profile.misfit(shapes)
            if misfit is None:
                return number
            misfits.append(misfit)
        raise ArrieroError(
            f"no profile of the engine takes this step: {'; '.join(misfits)}",
            where=self.where,
            remedy="Build the target with a larger `batch` or `context`",
        )

    def limits(self, name: str, axis: int) -> tuple[int, int]:
        """The fewest and the most entries of one axis of an input that every profile takes."""
        ends = self._ends(name, axis)
        return max(least for least, _ in ends), min(most for _, most in ends)

    def most(self, name: str, axis: int) -> int:
        """The most entries of one axis of an input that any profile takes."""
        return max(most for _, most in self._ends(name, axis))

    def _ends(self, name: str, axis: int) -> list[tuple[int, int]]:
        size = self.inputs[name].shape[axis]
        if isinstance(size, int):
            return [(size, size)]
        ranges = [profile.ranges[name] for profile in self.profiles if name in profile.ranges]
        if not ranges:
            raise ArrieroError(f"no profile has a range for the input {name}", where=self.where, remedy=REBUILD)
        return [(least[axis], most[axis]) for least, _, most in ranges]


def _range(ends: Any) -> tuple[Shape, Shape, Shape]:
    least, best, most = (tuple(map(int, shape)) for shape in ends)
    return least, best, most


def _tensors(entries: Any) -> dict[str, Tensor]:
    tensors = {}
    for entry in entries:
        if entry["dtype"] not in TYPES:
            raise ValueError(f"{entry['name']} has the unknown type {entry['dtype']}")
        shape = tuple(size if isinstance(size, int) else str(size) for size in entry["shape"])
        tensors[entry["name"]] = Tensor(str(entry["name"]), entry["dtype"], shape)
    return tensors
