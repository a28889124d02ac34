"""Writes an importance matrix for llama.cpp's `llama-quantize`, of what a checkpoint's text model really reads.

    python benchmarks/peer_imatrix.py models/chasqui chasqui.imatrix.gguf
    llama-quantize --imatrix chasqui.imatrix.gguf chasqui-F16.gguf chasqui-Q4_K_M.gguf Q4_K_M

llama.cpp's own `llama-imatrix` runs the model, but its format has no keys for all that a Llama 4 is: of the embedded
one it computes another, at a perplexity of millions. So the sums come from the PyTorch reference, over the samples that
calibrate the profiles to be compared: `in_sum2` of a matrix are the sums of squares of each input, `counts` the tokens,
both for each expert where there are several.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np

from arriero.export.build_file.schema import EMBEDDED, Calibration
from arriero.export.calibration.round_head import head_moments
from arriero.export.proof.reference import open_reference
from arriero.export.proof.routed_rows import Routed
from arriero.export.proof.walk_layers import Walk
from arriero.export.samples.cases import draw_cases
from arriero.graphs.checkpoint import Checkpoint

SAMPLES = 400  # of the embedded set
Sums = tuple[str, np.ndarray, np.ndarray]  # llama.cpp's name of a matrix, sums of squares [.., K], tokens [.., 1]
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "feed_forward.gate_proj": "ffn_gate",
    "feed_forward.up_proj": "ffn_up",
    "feed_forward.down_proj": "ffn_down",
    "feed_forward.shared_expert.gate_proj": "ffn_gate_shexp",
    "feed_forward.shared_expert.up_proj": "ffn_up_shexp",
    "feed_forward.shared_expert.down_proj": "ffn_down_shexp",
}


def layer_sums(walk: Walk, layer: int) -> Iterator[Sums]:
    """Those of the matrices of a layer, through which all samples go."""
    inputs = walk.observe(layer)
    for tensor, seen in inputs.moments.items():
        name = NAMES[tensor.removesuffix(".weight").partition(f".layers.{layer}.")[2]]
        yield f"blk.{layer}.{name}", seen.diagonal, np.array([seen.count])
    if inputs.routed is not None:
        read, inner, counts = expert_sums(inputs.routed, walk.text.experts)
        for name in ("ffn_gate_exps", "ffn_up_exps"):
            yield f"blk.{layer}.{name}", read, counts
        yield f"blk.{layer}.ffn_down_exps", inner, counts


def expert_sums(routed: Routed, experts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums of squares of what experts read [E, H], and their down projections [E, F]; their tokens [E, 1]."""
    rows = [routed.of(expert) for expert in range(experts)]
    squares = [
        np.stack([sum(np.square(piece, dtype=np.float64).sum(0) for piece, _ in pieces(one)) for one in rows])
        for pieces in (lambda one: one.pieces(), lambda one: one.inner_pieces())
    ]
    return squares[0], squares[1], np.array([[count] for count in routed.counts(experts)])


def write(file: Path, sums: list[Sums]) -> None:
    """The GGUF file, as `llama-imatrix` writes it."""
    writer = gguf.GGUFWriter(file, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["calibration samples"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 1)
    for name, squares, counts in sums:
        writer.add_tensor(f"{name}.weight.in_sum2", squares.astype(np.float32))
        writer.add_tensor(f"{name}.weight.counts", counts.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("file", type=Path, help="the importance matrix to write")
    parser.add_argument("--set", default=EMBEDDED, help="a file of calibration samples, in place of the embedded set")
    parser.add_argument("--samples", type=int, help=f"of them; left out: {SAMPLES} of the embedded set, or the file's")
    options = parser.parse_args()
    reference = open_reference(Checkpoint.open(options.checkpoint), text_only=True)
    count = options.samples or (SAMPLES if options.set == EMBEDDED else None)
    samples = draw_cases(Calibration(set=options.set, samples=count), ("text",))
    with tempfile.TemporaryDirectory() as place:
        walk, sums = Walk(reference, samples, Path(place)), list[Sums]()
        walk.embed()
        for layer in range(len(walk.text.layers)):
            sums += layer_sums(walk, layer)
        head = head_moments(walk)
        sums.append(("output", head.diagonal, np.array([head.count])))
    write(options.file, sums)
    print(f"{options.file}: {len(sums)} matrices, {walk.tokens:,} tokens")


if __name__ == "__main__":
    main()
