"""Position 1,000,000 with a global layer over all its keys: both CPU backends against a decoder in float64.

Takes 6 GB of memory, which is why the tests of every day have chunked layers alone at positions that high.

    python -m tests.long.positions FOLDER
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tests.long_rows import SCOUT, WINDOW, Window, native_kernels, open_backend
from tests.toys import make_scout_toy

POSITION = 1_000_000
# Relative to the largest value. A softmax over a million keys sums in float32: measured up to 5.3e-7.
TOLERANCE = 1e-5


class PositionsDiffer(Exception):
    """A backend that does not compute what float64 says."""


def run(folder: Path, position: int = POSITION) -> dict[str, tuple[float, float]]:
    """How far each backend's logits and keys are from float64's. Raises PositionsDiffer."""
    toy = make_scout_toy(folder / "toy", 7, vision=False, **SCOUT)
    window = Window(toy, position - WINDOW + 1)
    kernels = native_kernels(folder / "kernels.o")
    errors = {}
    for name in ("onnxruntime", "tvm"):
        errors[name] = window.run(open_backend(name, toy, folder / name, kernels))
        if max(errors[name]) > TOLERANCE:
            raise PositionsDiffer(f"{name}: logits are off by {errors[name][0]:.2g}, keys by {errors[name][1]:.2g}")
    return errors


def main() -> None:
    """Read the argument and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a new folder for the model and its builds")
    folder = parser.parse_args().folder.absolute()
    folder.mkdir(parents=True)
    for name, (logits, keys) in run(folder).items():
        print(f"{name}: logits within {logits:.2g}, keys within {keys:.2g} of float64's")


if __name__ == "__main__":
    main()
