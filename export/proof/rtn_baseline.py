"""A calibrated bundle against its own RTN baseline: what calibration is worth, measured before the bundle may ship."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from arriero.export.machine.memory_watch import release_memory
from arriero.runtimes.api import open_backend
from arriero.runtimes.memory import available_memory
from arriero.runtimes.processor.processor import Processor
from arriero.runtimes.proof.cases import Reference
from arriero.runtimes.proof.logits import KlSums
from arriero.runtimes.proof.parity import measure_kl
from arriero.runtimes.proof.shared_steps import tokens_together
from arriero.runtimes.session import Session


def measure_rtn_baseline(
    reference: Reference,
    backend: str,
    lower: Callable[[Path], object],
    folder: Path,
    progress: Callable[[int, int], None],
    memory: int | None,
) -> KlSums:
    """KL over the tokens of the reference's cases of the RTN baseline, a bundle's graphs with weights of their own.

    `lower` writes them, and the tokenizer, into the folder it is given, which lies in `folder` and is gone afterwards.
    The ids are the ones that parity forces through the calibrated form; `memory` are the bytes that this may use, None
    for what is free.
    """
    rtn = folder / "rtn"
    shutil.rmtree(rtn, ignore_errors=True)
    rtn.mkdir()
    lower(rtn)
    release_memory()
    progress(0, len(reference))
    spec = reference.spec
    stored = sum(file.stat().st_size for file in rtn.iterdir())
    with Session(open_backend(backend, rtn, spec), Processor(rtn / "tokenizer", spec)) as session:
        kl = measure_kl(session, reference, progress, tokens_together(spec, stored, memory, available_memory()))
    shutil.rmtree(rtn)
    return kl
