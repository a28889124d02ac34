"""Tensors that are made of stored ones when they are read: decoded, turned round, put together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arriero.graphs.sources.finite import check_finite, first_nonfinite, first_nonfinite_code
from arriero.graphs.sources.safetensors_header import NUMPY_DTYPES, to_float32
from arriero.graphs.sources.stored_codes import Codes, StoredCodes


@dataclass(frozen=True)
class MadeWeight:
    """A tensor whose rows `make(start, stop)` gives in `dtype` (see `WeightSource`)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    stored: str
    form: str
    make: Callable[[int, int], NDArray[Any]]
    stored_codes: StoredCodes | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor in `dtype`."""
        return int(np.prod(self.shape, dtype=np.int64)) * NUMPY_DTYPES[self.dtype].itemsize

    @property
    def codes(self) -> StoredCodes | None:
        """The codes and scales that the checkpoint holds. Reading them raises ArrieroError for NaN and infinity."""
        return None if self.stored_codes is None else replace(self.stored_codes, read=self._read_codes)

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
        check_finite(self, start, first_nonfinite(values, self.dtype))
        values.flags.writeable = False
        return values

    def float32(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows in float32."""
        return to_float32(self.rows(start, stop), self.dtype)

    def _read_codes(self, start: int, stop: int) -> Codes:
        assert self.stored_codes is not None
        codes = self.stored_codes.read(start, stop)
        check_finite(self, start, first_nonfinite_code(codes))
        return codes
