"""Gives a stripped engine its weights, from where they lie in the bundle's memory-mapped files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from arriero.errors import ArrieroError
from arriero.runtimes.engine_signature import REBUILD, TYPES, Signature


def refit(
    trt: Any, engine: Any, logger: Any, bundle: Path, signature: Signature, refused: Callable[[str], ArrieroError]
) -> None:
    """Set every weight of the signature's table in `engine`; nothing of it stays in the host's memory.

    Raises ArrieroError for a table that does not fit the files or the engine.
    """
    refitter = trt.Refitter(engine, logger)
    files: dict[str, np.memmap] = {}
    for name, entry in signature.weights.items():
        where = f"{signature.where}:weights.{name}"
        try:
            file, offset, dtype = str(entry["file"]), int(entry["offset"]), str(entry["dtype"])
            count = int(np.prod(entry["shape"], dtype=np.int64))
            kind, item = TYPES[dtype][0], np.dtype(TYPES[dtype][1]).itemsize
        except (KeyError, TypeError, ValueError) as error:
            raise ArrieroError(f"the entry is malformed ({error!r})", where=where, remedy=REBUILD) from None
        if file not in files:
            files[file] = np.memmap(bundle / file, np.uint8, "r")
        nbytes = -(-count // 2) if dtype == "INT4" else count * item
        if offset + nbytes > len(files[file]):
            raise ArrieroError(
                f"the weight ends at byte {offset + nbytes} of a file of {len(files[file])}",
                where=where,
                remedy=REBUILD,
            )
        address = files[file].ctypes.data + offset
        if not refitter.set_named_weights(name, trt.Weights(getattr(trt.DataType, kind), address, count)):
            raise refused(f"the weight {name}")
    if missing := refitter.get_missing_weights():
        raise ArrieroError(
            f"weights of the engine are not in the table: {', '.join(list(missing)[:4])}",
            where=f"{signature.where}:weights",
            remedy=REBUILD,
        )
    if not refitter.refit_cuda_engine():
        raise refused("its weights")
