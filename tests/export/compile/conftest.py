"""The CPU kernels: as compiled graphs link them in, and at each instruction-set level that can be run here."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from pathlib import Path

import numpy as np
import pytest

from arriero.errors import MachineLacks
from arriero.export.compile import build_kernels
from arriero.export.compile.build_kernels import FLAGS, LEVELS, SOURCES, find_compiler, link_shared
from tests.guarded_kernels import Guarded
from tests.kernel_emulated import RUNNER, EmulatedKernels, link_runner
from tests.shared import locked

HERE = platform.machine()


@pytest.fixture(scope="session")
def kernels(tvm_workshop: Path) -> Path:
    """The object file of our kernels for this machine."""
    (found,) = tvm_workshop.glob("bundles/.work/kernels-*/kernels.o")
    return found


def cached(request, name, more=b""):
    """A path that stays from run to run until the kernels' sources or `more` change."""
    sources = [path.read_bytes() for path in sorted(SOURCES.iterdir())]
    key = hashlib.sha256(b"".join([*sources, json.dumps([LEVELS, FLAGS]).encode(), more])).hexdigest()[:16]
    return request.config.cache.mkdir("kernels") / f"{name}-{key}.so"


@pytest.fixture(scope="session")
def library(request):
    """The kernels of this machine, compiled once per version of the sources."""
    path = cached(request, HERE)
    with locked(path):
        if not path.is_file():
            build_kernels.build_kernels(HERE, path.with_suffix(".o"))
            link_shared(path.with_suffix(".o"), path)
    return path


@pytest.fixture(scope="session")
def runner(request):
    """The program that runs aarch64 kernels under qemu; skipped where the machine lacks a tool for it."""
    if shutil.which("qemu-aarch64-static") is None:
        pytest.skip("needs qemu: apt-get install qemu-user-static")
    try:
        find_compiler("aarch64")
    except MachineLacks as lacks:
        pytest.skip(f"needs a compiler: {lacks}")
    path = cached(request, "aarch64-runner", RUNNER.read_bytes())
    with locked(path):
        if not path.is_file():
            build_kernels.build_kernels("aarch64", path.with_suffix(".o"))
            link_runner("aarch64", path.with_suffix(".o"), path)
    return path


# A CPU that has each level and nothing above it
EMULATED = {"neon": "cortex-a53", "dotprod": "neoverse-n1", "i8mm": "max"}


@pytest.fixture(params=[*LEVELS.get(HERE, {}), *(f"emulated {level}" for level in EMULATED if HERE != "aarch64")])
def kernels_at_level(request, tmp_path):
    """The kernels at one level, with the work cut in three."""
    level = request.param.removeprefix("emulated ")
    if level != request.param:
        emulator = ["qemu-aarch64-static", "-cpu", EMULATED[level]]
        return EmulatedKernels(emulator, request.getfixturevalue("runner"), level, 3, tmp_path)
    kernels = Guarded(request.getfixturevalue("library"), 3)
    if not kernels.use_level(level):
        pytest.skip(f"needs a CPU with {level}")
    assert kernels.level() == level
    return kernels


@pytest.fixture
def draw():
    return np.random.default_rng(7)
