"""NaN and infinity in stored weights, found in the bytes as they pass by.

Legend: N output features, K input features, E experts.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arriero.errors import ArrieroError
from arriero.graphs.sources.stored_codes import Codes
from arriero.graphs.sources.weight_source import WeightSource
from arriero.profiles.float8 import Float8, dequantize_float8
from arriero.profiles.quantize import dequantize

# Of each float dtype: the unsigned integer of its size, and the bits that are all set in NaN and infinity alone.
EXPONENTS = {
    "F64": (np.uint64, 0x7FF0_0000_0000_0000),
    "F32": (np.uint32, 0x7F80_0000),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
    "F8_E5M2": (np.uint8, 0x7C),
    "F8_E4M3": (np.uint8, 0x7F),  # it has no infinity, and one NaN of each sign
}


CHUNK = 1 << 18  # values that are looked at together: more would not stay in a core's cache
# Times the largest code of any scheme, 448 of E4M3, a scale up to here is a finite number.
SAFE_SCALE = np.float32(np.finfo(np.float32).max / 512)


def first_nonfinite(values: bytes | memoryview | NDArray[Any], dtype: str) -> int | None:
    """The number of the first value, of a safetensors dtype, that is NaN or infinite; None where all are finite."""
    if dtype not in EXPONENTS:
        return None
    unsigned, mask = EXPONENTS[dtype]
    bits = np.frombuffer(np.ascontiguousarray(values) if isinstance(values, np.ndarray) else values, unsigned)
    for at in range(0, len(bits), CHUNK):
        exponents = bits[at : at + CHUNK] & unsigned(mask)
        if exponents.max() == mask:  # no other number has all of its bits
            return at + int(exponents.argmax())
    return None


def first_nonfinite_code(codes: Codes) -> int | None:
    """The same of the values that codes stand for, counted over a matrix [N, K] or a stack turned round [E, K, N]."""
    nan = isinstance(codes, Float8) and first_nonfinite(codes.bits, "F8_E4M3") is not None
    if not nan and (np.abs(codes.scales) <= SAFE_SCALE).all():
        return None
    with np.errstate(over="ignore", invalid="ignore"):  # which is what is looked for
        values = dequantize_float8(codes) if isinstance(codes, Float8) else dequantize(codes)
    return first_nonfinite(values if values.ndim == 2 else values.transpose(0, 2, 1), "F32")


def check_finite(source: WeightSource, start: int, number: int | None) -> None:
    """Refuse `source` for the value `number` of those from row `start` on; None is for no value."""
    if number is not None:
        raise not_finite(source, start * math.prod(source.shape[1:]) + number)


def not_finite(source: WeightSource, number: int) -> ArrieroError:
    """The refusal of a tensor for its value `number`, counted over its flat values."""
    index = ", ".join(str(int(each)) for each in np.unravel_index(number, source.shape)) if source.shape else ""
    return ArrieroError(
        f"the value at [{index}] is NaN or infinite",
        where=f"{source.name} ({source.stored})",
        expected="finite weights",
        remedy="Download the file again; if it is the same, the checkpoint was saved broken: take an earlier one",
    )
