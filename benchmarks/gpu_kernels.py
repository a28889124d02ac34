"""The CUDA kernels of the expert dispatch on a GPU: first checked, then timed.

Needs Python 3.11, NVIDIA's driver, and of packages `pip install numpy ml_dtypes`; to compile the kernels also g++ and
`pip install nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-crt nvidia-nvvm` (or CUDA 12.8 or newer), or a folder of
code compiled elsewhere (`python benchmarks/gpu_code.py FOLDER sm_90`); for the peers `pip install torch`. Arriero
itself need not be installed.

    python benchmarks/gpu_kernels.py [--check] [--code FOLDER] [--tokens 1 4 16 64 512 2048] [--forms exact int4 ...]

Checked against float64 numpy at odd, long and released shapes (--check does only this). Timed on Scout's shapes (hidden
5,120, experts of 8,192, 16 of them, top-1) beside the bandwidth of a kernel that only reads, measured in the same
rounds, and beside PyTorch's products of the same shapes; what was timed is compared as well. int8 and fp8 multiply
eight bits by eight; rounding their inputs to codes, which standard operators do, is not in the times. Forms that the
GPU has no products for are left out. Writes a JSON file with date and hardware into benchmarks/results/;
docs/nvidia.md says how to read it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
from cuda_driver import CudaGpu, open_driver
from gpu_check import CASES, check
from gpu_code import code_for
from gpu_peers import measure_peers
from gpu_timing import measure, over_runs

from arriero.errors import ArrieroError
from arriero.export.compile.cuda.build_cuda_kernels import kernels_for
from arriero.export.compile.cuda.launch import FORMS, OPS, SHAPES

RESULTS = Path(__file__).parent / "results"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="check only; nothing is timed or written")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="shapes to check")
    parser.add_argument("--time", action="store_true", help="time only, what was checked before")
    parser.add_argument("--code", type=Path, metavar="FOLDER", help="compiled elsewhere, by gpu_code.py")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 512, 2048])
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    parser.add_argument("--ops", nargs="+", choices=list(OPS), default=list(OPS))
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES), help="kinds of kernels")
    parser.add_argument("--hidden", type=int, default=5120)
    parser.add_argument("--ffn", type=int, default=8192)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--runs", type=int, default=1, help="measure everything so often, for the spread")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="without PyTorch's products")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None, open_library: Callable[[], Any] = open_driver) -> int:
    """Check and measure; 1 if a kernel computes something else."""
    options = parse(arguments)
    gpu = CudaGpu(open_library(), partial(code_for, folder=options.code))
    known = {kernel.form for kernel in kernels_for(gpu.architecture)}
    forms = [form for form in options.forms if form in known]
    checked = [] if options.time else check(gpu, forms, options.cases, partial(print, "checked:", flush=True))
    wrong = [row for row in checked if not row["right"]]
    worst = max((row["error"] for row in checked), default=0.0)
    right = f"{len(checked) - len(wrong)} of {len(checked)} right, worst error {worst:.1e}"
    print(f"{gpu.name}, {gpu.architecture}: {right}" if checked else f"{gpu.name}, {gpu.architecture}")
    for row in wrong:
        print(json.dumps(row))
    if wrong or options.check:
        return 1 if wrong else 0
    now = datetime.datetime.now(datetime.UTC)
    ours, peers = [], []
    for _ in range(options.runs):
        ours.append(measure(gpu, forms, options))
        peers.append(measure_peers(options) if options.peers else [])
    gpu.close()
    report = {
        "date": now.isoformat(timespec="seconds"),
        "hardware": {"gpu": gpu.name, "architecture": gpu.architecture, "driver_cuda": gpu.driver_version},
        "shape": {"hidden": options.hidden, "ffn": options.ffn, "experts": options.experts, "choices": 1},
        "rounds": options.rounds,
        "checked": checked,
        "kernels": over_runs(ours),
        "peers": over_runs(peers),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"gpu_kernels-{gpu.architecture}-{now:%Y%m%d-%H%M%S}.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(path)
    wrong = sorted({row["kernel"] for rows in ours for row in rows if not row["right"]})
    if wrong:
        print(f"timed launches were wrong: {', '.join(wrong)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ArrieroError as error:
        sys.exit(str(error))
