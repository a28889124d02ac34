"""Tensors that are made of stored ones when they are read: decoded, turned round, put together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arriero.graphs.sources.finite import not_finite
from arriero.graphs.sources.safetensors_header import NUMPY_DTYPES, to_float32
from arriero.graphs.sources.stored_codes import StoredCodes


@dataclass(frozen=True)
class MadeWeight:
    """A tensor whose rows `make(start, stop)` gives in `dtype` (see `WeightSource`)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    stored: str
    form: str
    make: Callable[[int, int], NDArray[Any]]
    codes: StoredCodes | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor in `dtype`."""
        return int(np.prod(self.shape, dtype=np.int64)) * NUMPY_DTYPES[self.dtype].itemsize

    @property
    def place(self) -> None:
        """No file holds these bytes."""
        return None

    def rows(self, start: int, stop: int) -> NDArray[Any]:
        """Rows, made now. Raises ValueError for rows beyond the tensor, ArrieroError for NaN and infinity."""
        count = self.shape[0] if self.shape else 1
        if not 0 <= start <= stop <= count:
            raise ValueError(f"rows {start}:{stop} of {self.name} with shape {list(self.shape)}")
        values = self.make(start, stop)
        if self.dtype == "F32" and not np.isfinite(values).all():
            first = int(np.flatnonzero(~np.isfinite(values).reshape(-1))[0])
            raise not_finite(self, start * int(np.prod(self.shape[1:], dtype=np.int64)) + first)
        values.flags.writeable = False
        return values

    def float32(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows in float32."""
        return to_float32(self.rows(start, stop), self.dtype)
