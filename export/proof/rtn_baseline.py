"""A calibrated bundle against its own RTN baseline: what calibration is worth, measured before the bundle may ship."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from arriero.graphs.stored.link_file import link_file
from arriero.runtimes.api import open_backend
from arriero.runtimes.processor.processor import Processor
from arriero.runtimes.proof.cases import Reference
from arriero.runtimes.proof.logits import KlSums
from arriero.runtimes.proof.parity import measure_kl
from arriero.runtimes.session import Session


def measure_rtn_baseline(
    reference: Reference,
    backend: str,
    lowered: Path,
    lower_text: Callable[[Path], object],
    folder: Path,
    progress: Callable[[int, int], None],
) -> KlSums:
    """KL over the tokens of the reference's cases of the RTN baseline: `lowered` with another text graph.

    `lower_text` writes that graph with its weights into the folder it is given, which lies in `folder` and is gone
    afterwards. The ids are the ones that parity forces through the calibrated form.
    """
    rtn = folder / "rtn"
    shutil.rmtree(rtn, ignore_errors=True)
    rtn.mkdir()
    lower_text(rtn)
    progress(0, len(reference))
    for file in sorted(lowered.rglob("*")):
        name = file.relative_to(lowered)
        if file.is_file() and name.parts[0] != "tokenizer" and not (rtn / name).exists():
            link_file(file, rtn / name)
    spec = reference.spec
    with Session(open_backend(backend, rtn, spec), Processor(lowered / "tokenizer", spec)) as session:
        kl = measure_kl(session, reference, progress)
    shutil.rmtree(rtn)
    return kl
