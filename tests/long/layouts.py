"""Writes the embedded model in every layout by the library that writes it, builds each, and asks the bundles.

    python -m tests.long.layouts FOLDER [--only compressed_tensors-w4a16 gguf-Q4_K ..]

Each is built for ONNX Runtime exactly and for TVM as it is stored, proven, and has to answer 42. A line for each: what
the tensors are stored as, what becomes of the quantised ones, and the KL of both bundles.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

CHASQUI = Path(__file__).parents[2] / "models" / "chasqui"
WRITERS = ("compressed_tensors", "bitsandbytes", "modelopt", "gguf", "meta")
QUESTION, ANSWER = "What is 17 + 25?", "42"
BUILD = """version: 1
model: {model}
modalities: [text, image]
output: bundles
targets:
  - {{name: ort, backend: onnxruntime, profile: fp32, context: 512}}
  - {{name: tvm, backend: tvm, profile: as-stored, context: 512}}
calibration: {{samples: 4}}
parity: {{cases: {{samples: 12}}}}
"""


class WrongAnswer(Exception):
    """A bundle did not answer as the model does."""


def layouts() -> list[str]:
    """The names of all cases: writer and kind."""
    names = []
    for writer in WRITERS:
        module = importlib.import_module(f"tests.layouts.{writer}")
        names += [f"{writer}-{kind}" for kind in (getattr(module, "SCHEMES", None) or module.KINDS)]
    return names


def arriero(folder: Path, *arguments: str) -> str:
    """Run the command in `folder`; gives its standard output. Raises CalledProcessError, with what it said."""
    command = [sys.executable, "-m", "arriero.export", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout, done.stderr, file=sys.stderr)
        done.check_returncode()
    return done.stdout


def build(folder: Path, name: str, tell: Callable[[str], None] = print) -> dict[str, float]:
    """Write, build and ask one layout in `folder`; gives the mean KL of both bundles. Raises WrongAnswer."""
    import torch

    writer, _, kind = name.partition("-")
    importlib.import_module(f"tests.layouts.{writer}").write(CHASQUI, folder / "model", kind, torch.bfloat16)
    (folder / "build.yaml").write_text(BUILD.format(model="model"))
    plan = json.loads(arriero(folder, "plan", "build.yaml", "--json"))
    arriero(folder, "build", "build.yaml")
    divergence = {}
    for target in ("ort", "tvm"):
        bundle = folder / "bundles" / target
        answer = arriero(folder, "run", str(bundle), QUESTION)
        if answer.splitlines()[0].strip() != ANSWER:
            raise WrongAnswer(f"{name}, {target}: {answer!r}")
        rows = json.loads((bundle / "parity.json").read_text())["rows"]
        divergence[target] = next(row["value"] for row in rows if row["metric"] == "logits_kl_mean")
    stored = ", ".join(f"{form} {count}" for form, count in plan["model"]["stored_as"].items())
    kept = ", ".join(f"{count} {kind}" for kind, count in plan["targets"][1]["quantised"].items()) or "none quantised"
    tell(f"{name:32} {stored:44} {kept:36} KL {divergence['ort']:.1e} exact, {divergence['tvm']:.1e} as stored")
    return divergence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder for checkpoints and bundles, emptied layout by layout")
    parser.add_argument("--only", nargs="*", default=None, help="names of layouts, all when left out")
    options = parser.parse_args(arguments)
    for name in options.only or layouts():
        folder = options.folder.absolute() / name
        folder.mkdir(parents=True)
        build(folder, name)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
