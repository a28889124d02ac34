"""What llama.cpp's files lose against the checkpoint that they were made of, beside what our bundles lose.

    python benchmarks/peer_quality.py models/chasqui chasqui-Q4_0.gguf chasqui-Q8_0.gguf

The files are those of llama.cpp's own converter and `llama-quantize`. Their weights are read with the values that its
library gives them (docs/checkpoints.md) and put into the checkpoint's model, because the format has no keys for all
that a Llama 4 is; the PyTorch reference multiplies them in float32. The cases are those of a build with `modalities:
[text]` and `parity: {cases: {samples: 200}}`, or those of `--set FILE` as `parity: {cases: {set: FILE}}` has them, so
that the mean KL and the share of right answers stand beside those of its bundles. What llama.cpp loses by rounding
activations is left out, in its favour; ours round them, and that is in their KL.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from arriero.export.build_file.schema import EMBEDDED, Cases
from arriero.export.proof.live_reference import LiveReference
from arriero.export.proof.reference import open_reference
from arriero.export.samples.cases import draw_cases
from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.names import expected_tensors
from arriero.runtimes.proof.cases import answer_limit
from arriero.runtimes.proof.parity import compare_logits
from arriero.runtimes.proof.parity_case import ParityCase
from arriero.runtimes.proof.sampling_error import mean_error
from arriero.runtimes.session import Session

SAMPLES = 200  # of the embedded set


@dataclass
class Found:
    """What a file's weights make of the cases: KL in nats of each one's tokens [S], and which answers are right."""

    kl: list[NDArray[np.float64]] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)


def put_weights(checkpoint: Path, file: Path, folder: Path) -> Path:
    """The text model of `checkpoint` in `folder`, with the weights that the GGUF `file` holds in place of its own.

    Raises ValueError for a file that holds other tensors.
    """
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    own, held = Checkpoint.open(checkpoint), Checkpoint.open(file)
    names = expected_tensors(own.model_config().without_vision())
    read = {name if name in held.tensors else name.removeprefix("language_model."): name for name in names}
    if read.keys() != held.tensors.keys():
        different = sorted(read.keys() ^ held.tensors.keys())
        raise ValueError(f"{file} holds other tensors than {checkpoint}: {', '.join(different[:4])}")
    weights = {name: torch.from_numpy(held.read_float32(theirs).copy()) for theirs, name in read.items()}
    for name in own.tensors.keys() - weights.keys():
        weights[name] = torch.from_numpy(own.read_float32(name).copy())
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def open_model(checkpoint: Path) -> Session:
    """A session over the PyTorch reference of a checkpoint's text model."""
    return open_reference(Checkpoint.open(checkpoint), text_only=True)


def measure(checkpoint: Path, files: Sequence[Path], cases: Sequence[ParityCase]) -> dict[str, Found]:
    """KL(checkpoint || model with the file's weights) and the answers of the latter, by the file's name."""
    reference = LiveReference(open_model(checkpoint), cases, "forced")
    found = {file.name: Found() for file in files}
    with tempfile.TemporaryDirectory() as place:
        sessions = {file.name: open_model(put_weights(checkpoint, file, Path(place) / file.name)) for file in files}
        for case in reference:
            for name, session in sessions.items():
                found[name].kl += [figures.token_kl for figures in compare_logits(session, [case])]
                said = session.generate(case.case.prompt, max_tokens=answer_limit(len(case.expected_ids))).text
                if (right := case.case.is_right(said)) is not None:
                    found[name].right.append(right)
    return found


def main() -> None:
    """Measure the files and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="what the files were made of")
    parser.add_argument("files", nargs="+", type=Path, help="GGUF files of its text model")
    parser.add_argument("--set", default=EMBEDDED, help="a file of parity cases, in place of the embedded set")
    parser.add_argument("--samples", type=int, help=f"of them; left out: {SAMPLES} of the embedded set, or the file's")
    options = parser.parse_args()
    samples = options.samples or (SAMPLES if options.set == EMBEDDED else None)
    found = measure(options.checkpoint, options.files, draw_cases(Cases(set=options.set, samples=samples), ("text",)))
    for file in options.files:
        kl, right = found[file.name].kl, found[file.name].right
        each = np.concatenate(kl)
        told = f"mean KL {each.mean():.5f} ± {mean_error(kl):.5f} over {len(each):,} tokens"
        print(f"{file.name}: {file.stat().st_size / 2**20:.2f} MiB, {told}, {sum(right)} of {len(right)} answers right")


if __name__ == "__main__":
    main()
