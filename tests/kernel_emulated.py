"""The kernels of another architecture under qemu-user, with the methods of `call_kernels.Kernels`."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from arriero.export.compile.build_kernels import SOURCES, find_compiler
from tests.call_kernels import CACHE_FORMATS, FORMATS, TWICE, Experts, Weight

RUNNER = Path(__file__).with_name("kernel_runner.cc")


def link_runner(architecture: str, kernels: Path, out: Path) -> None:
    """Link the object `kernels` with the runner into a program that needs nothing of the emulated system."""
    command = [find_compiler(architecture), "-O1", "-static", f"-I{SOURCES}", str(RUNNER), str(kernels), "-o", str(out)]
    subprocess.run(command, check=True)


class EmulatedKernels:
    """Each call is a run of `emulator` (a command) on the program `runner`."""

    def __init__(self, emulator: list[str], runner: Path, level: str, parts: int, folder: Path) -> None:
        self.command = [*emulator, str(runner), level, str(parts)]
        self.folder = folder

    def linear(self, x: np.ndarray, weight: Weight, outputs: int, twice: bool = False) -> np.ndarray:
        y = np.empty((len(x), outputs), np.float32)
        form = (FORMATS[weight.format] + TWICE * twice, weight.block)
        self._run(0, *form, len(x), outputs, x.shape[1], x, weight.data, weight.scales, y, written=[y])
        return y

    def dispatch(
        self, x: np.ndarray, expert_id: np.ndarray, score: np.ndarray, experts: Experts, width: int
    ) -> np.ndarray:
        y = np.empty(x.shape, np.float32)
        sizes = (len(x), expert_id.shape[1], len(experts.records), x.shape[1], width)
        self._run(1, *experts.form, *sizes, *experts.at, x, expert_id, score, experts.records, y, written=[y])
        return y

    def attention(
        self,
        q: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        positions: np.ndarray,
        key_cache: np.ndarray,
        value_cache: np.ndarray,
        chunk: int,
        steps: tuple[np.ndarray, np.ndarray] | tuple[None, None] = (None, None),
        starts: np.ndarray | None = None,
    ) -> np.ndarray:
        batch, groups, slots, size = key_cache.shape
        out = np.empty_like(q)
        starts = q.shape[1] * np.arange(batch + 1) if starts is None else starts
        sizes = (batch, positions.size, q.shape[2] // size, groups, slots, size, chunk)
        caches, form = (key_cache, value_cache), CACHE_FORMATS[key_cache.dtype.name]
        self._run(2, form, *sizes, q, k, v, positions, *caches, *steps, out, starts, written=[*caches, out])
        return out

    def full_attention(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        out = np.empty_like(q)
        self._run(3, *q.shape, q, k, v, out, written=[out])
        return out

    def _run(self, *arguments: Any, written: list[np.ndarray]) -> None:
        source, target = self.folder / "in", self.folder / "out"
        with source.open("wb") as file:
            file.write(np.int64(len(arguments)).tobytes())
            for argument in arguments:
                if isinstance(argument, int):
                    file.write(np.array([0, argument], np.int64).tobytes())
                else:
                    data = b"" if argument is None else argument.tobytes()
                    file.write(np.array([1, len(data)], np.int64).tobytes() + data)
        subprocess.run([*self.command, str(source), str(target)], check=True)
        data, start = target.read_bytes(), 0
        for array in written:
            array[...] = np.frombuffer(data[start : start + array.nbytes], array.dtype).reshape(array.shape)
            start += array.nbytes
        assert start == len(data)
