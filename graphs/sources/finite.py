"""NaN and infinity in stored weights, found in the bytes as they pass by."""

from __future__ import annotations

import numpy as np

from arriero.errors import ArrieroError
from arriero.graphs.sources.weight_source import WeightSource

# Of each float dtype: the unsigned integer of its size, and the bits that are all set in NaN and infinity alone.
EXPONENTS = {
    "F64": (np.uint64, 0x7FF0_0000_0000_0000),
    "F32": (np.uint32, 0x7F80_0000),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
    "F8_E5M2": (np.uint8, 0x7C),
    "F8_E4M3": (np.uint8, 0x7F),  # it has no infinity, and one NaN of each sign
}


def first_nonfinite(values: bytes | memoryview, dtype: str) -> int | None:
    """The number of the first value, of a safetensors dtype, that is NaN or infinite; None where all are finite."""
    if dtype not in EXPONENTS:
        return None
    unsigned, mask = EXPONENTS[dtype]
    bits = np.frombuffer(values, unsigned)
    found = (bits & unsigned(mask)) == unsigned(mask)
    return int(found.argmax()) if found.any() else None


def not_finite(source: WeightSource, number: int) -> ArrieroError:
    """The refusal of a tensor for its value `number`, counted over its flat values."""
    index = ", ".join(str(int(each)) for each in np.unravel_index(number, source.shape)) if source.shape else ""
    return ArrieroError(
        f"the value at [{index}] is NaN or infinite",
        where=f"{source.name} ({source.stored})",
        expected="finite weights",
        remedy="Download the file again; if it is the same, the checkpoint was saved broken: take an earlier one",
    )
