"""What the profiles for GPUs cost in accuracy, measured without a GPU.

    python benchmarks/gpu_profiles.py [benchmarks/gpu_profiles.yaml] [--samples 200] [--targets gpu-int4 ...]

Calibrates as a build does and lowers as a build does; the graphs that TensorRT for RTX would compile are then run by
ONNX Runtime on this processor and judged against the PyTorch reference, and against their RTN baseline. With --samples,
that many held-out prompts of each task family are answered as well. What a GPU's own kernels change is not in it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from arriero.export.build_file.read import load_build  # noqa: E402
from arriero.export.build_file.schema import Target  # noqa: E402
from arriero.export.pipeline.build import Build  # noqa: E402
from arriero.export.pipeline.plan import make_plan  # noqa: E402
from arriero.export.pipeline.target_build import TargetBuild  # noqa: E402
from arriero.export.pipeline.target_thresholds import thresholds  # noqa: E402
from arriero.models.evaluate import family_accuracy  # noqa: E402
from arriero.runtimes.onnxruntime import OrtBackend  # noqa: E402
from arriero.runtimes.processor.processor import Processor  # noqa: E402
from arriero.runtimes.proof.parity import measure as measure_parity  # noqa: E402
from arriero.runtimes.proof.parity import measure_kl  # noqa: E402
from arriero.runtimes.session import Session  # noqa: E402

TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class GpuGraphs(OrtBackend):
    """The graphs lowered for TensorRT on ONNX Runtime's CPU: their caches are 16-bit and have no counters."""

    literal = True

    def _check_signature(self) -> None:
        caches = {entry.type for entry in self._text.get_inputs() if entry.name.startswith("past_")}
        self._cache_type, self._counters, self._has_adapters = TYPES[caches.pop()], [], False


def progress(step: str, done: int, total: int, unit: str) -> None:
    """One line of progress, written over."""
    print(f"\r{step}: {done:,} of {total:,} {unit}".ljust(100), end="", file=sys.stderr, flush=True)


def measure(build: Build, target: Target, samples: int) -> dict[str, Any]:
    """The target's parity, its KL against the RTN baseline's, and task accuracy on `samples` prompts of each family."""
    one = TargetBuild(build, target)
    profile, limits = one.decided, thresholds(build.config, target, one.profile)
    spec = build.record.spec
    processor = Processor(build.checkpoint.side_folder, spec)

    with tempfile.TemporaryDirectory(dir=build.config.output) as scratch:
        folders = Path(scratch) / "calibrated", Path(scratch) / "rtn"
        forms = (profile, one.roundings), (profile.rtn_baseline(), None)
        for folder, (form, roundings) in zip(folders, forms, strict=True):
            folder.mkdir()
            one.lower_parts(target, build.parts, form, roundings, folder)

        def watch(done: int, total: int, *_: object) -> None:
            progress(target.name, done, total, "cases")

        rtn = None
        if profile.calibration is not None:
            with Session(GpuGraphs(folders[1], spec), processor) as session:
                rtn = measure_kl(session, build.record, watch)
        with Session(GpuGraphs(folders[0], spec), processor, target.context, target.batch) as session:
            report = measure_parity(session, build.record, limits, watch, rtn_kl=rtn)
            accuracy = family_accuracy(session, samples, 101) if samples else {}
    rows = {row.metric: row.value for row in report.rows}
    failed = [row.metric for row in report.failed]
    return {"target": target.name, "failed": failed, "rows": rows, "accuracy": accuracy}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every target of the build file; 1 if one is below its thresholds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=Path(__file__).with_suffix(".yaml"))
    parser.add_argument("--samples", type=int, default=0, help="held-out prompts of each task family to answer")
    parser.add_argument("--targets", nargs="+", help="these alone; all, when left out")
    options = parser.parse_args(arguments)
    build = Build(load_build(options.file), str(options.file), progress)
    build.plan = make_plan(build.config)
    results = []
    with build.at_work():
        for target in build.config.targets:
            if options.targets and target.name not in options.targets:
                continue
            results.append(measure(build, target, options.samples))
            print(json.dumps(results[-1], indent=1), flush=True)
    print(datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
    return 1 if any(result["failed"] for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
