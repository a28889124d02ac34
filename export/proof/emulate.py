"""Runs a bundle that was compiled for another processor, under qemu's user emulation, as a backend like any other.

The runtime runs whole on the other side: its Python, its packages and the bundle, as on a device. `tests/arm/set_up.sh`
makes the folder that holds them, and `ARRIERO_ARM64` names it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arriero.errors import ArrieroError, MachineLacks
from arriero.runtimes.backend import Cache, Floats, Ints, ModelSpec, StepOutput
from arriero.runtimes.cpu import architecture
from arriero.runtimes.remote import Arrays, read_message, write_message

PACKAGE = Path(__file__).resolve().parents[2]
VARIABLE = "ARRIERO_ARM64"
EMULATOR = "qemu-aarch64-static"
PYTHON = "usr/bin/python3.11"


def can_emulate(arch: str) -> bool:
    """Whether this machine runs programs for the architecture `arch` in an emulated one."""
    folder = os.environ.get(VARIABLE, "")
    ready = folder and (Path(folder) / "site.ready").is_file() and (Path(folder) / "rootfs.ready").is_file()
    return bool(arch == "aarch64" and ready and shutil.which(EMULATOR))


def check_emulation(arch: str, where: str) -> Path:
    """The folder of the emulated machine. Raises MachineLacks when there is none."""
    if not can_emulate(arch):
        raise MachineLacks(
            f"a bundle for {arch} cannot be run on this {architecture()} machine",
            where=where,
            expected=f"64-bit ARM under qemu, in the folder that {VARIABLE} names",
            remedy="Run `arriero parity` on a machine of that kind, or make one here with `tests/arm/set_up.sh FOLDER`",
        )
    return Path(os.environ[VARIABLE]).absolute()


def emulated(folder: Path, arguments: Sequence[str]) -> list[str]:
    """The command that runs the emulated machine's Python with `arguments`, our package among its own."""
    # The package under its own name, whatever the folder that holds it is called; several may share the machine.
    ours = folder / "ours" / hashlib.sha256(os.fsencode(PACKAGE)).hexdigest()[:12]
    ours.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        (ours / "arriero").symlink_to(PACKAGE)
    rootfs = folder / "rootfs"
    path = f"PYTHONPATH={ours}:{folder / 'site'}"
    return [EMULATOR, "-cpu", "max", "-L", str(rootfs), "-E", path, str(rootfs / PYTHON), "-P", *arguments]


class EmulatedCache:
    """Some rows of a cache on the other side; only its lengths are kept here as well."""

    def __init__(self, owner: EmulatedBackend, number: int, start: int, lengths: Ints, capacity: int) -> None:
        self.owner, self.number, self.start = owner, number, start
        self.lengths, self.capacity = lengths, capacity

    def rows(self, start: int, stop: int) -> EmulatedCache:
        """Rows `start` to `stop` of these rows."""
        return EmulatedCache(self.owner, self.number, self.start + start, self.lengths[start:stop], self.capacity)

    def copy_row(self, source: int, target: int) -> None:
        """Make row `target` of these rows hold what row `source` of them holds."""
        rows = {"source": self.start + source, "target": self.start + target}
        self.owner.ask({"do": "copy_row", "cache": self.number, **rows})
        self.lengths[target] = self.lengths[source]


class EmulatedBackend:
    """The backend of a foreign bundle, in an emulated process. Calls of several threads are answered in turn."""

    def __init__(self, bundle: Path, spec: ModelSpec, arch: str) -> None:
        """Start the process; it opens the bundle with all the checks of a device. Raises what it refuses."""
        self.spec = spec
        folder = check_emulation(arch, str(bundle))
        command = emulated(folder, ["-m", "arriero.runtimes.remote", str(bundle.absolute()), "1"])
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=folder)
        self._lock = threading.Lock()
        self._dropped: list[int] = []  # caches that nobody holds any more, told with the next call
        self._receive()

    def ask(self, call: dict[str, Any], arrays: Arrays | None = None) -> tuple[dict[str, Any], Arrays]:
        """Send one call and give its answer. Raises ArrieroError with what the other side refuses."""
        assert self._process.stdin is not None
        with self._lock:
            dropped, self._dropped = self._dropped, []
            write_message(self._process.stdin, {**call, "dropped": dropped}, arrays or {})
            return self._receive()

    def _receive(self) -> tuple[dict[str, Any], Arrays]:
        assert self._process.stdout is not None
        try:
            reply, arrays = read_message(self._process.stdout)
        except EOFError:
            code = self._process.wait()
            raise ArrieroError(
                f"the emulated runtime ended with code {code}", remedy="Its last words stand above"
            ) from None
        if "error" in reply:
            raise ArrieroError(f"the emulated runtime refuses: {reply['error']}")
        return reply, arrays

    def vision(self, pixel_values: Floats) -> Floats:
        """See `Backend.vision`."""
        return self.ask({"do": "vision"}, {"pixel_values": pixel_values})[1]["found"]

    def embed(self, input_ids: Ints, image_features: Floats) -> Floats:
        """See `Backend.embed`."""
        return self.ask({"do": "embed"}, {"input_ids": input_ids, "image_features": image_features})[1]["found"]

    def new_cache(self, batch: int, capacity: int) -> EmulatedCache:
        """See `Backend.new_cache`."""
        reply, _ = self.ask({"do": "new_cache", "batch": batch, "capacity": capacity})
        cache = EmulatedCache(self, reply["cache"], 0, np.zeros(batch, np.int64), capacity)
        # views of rows share the lengths, so these live as long as anyone may still step the cache
        weakref.finalize(cache.lengths, lambda: self._dropped.append(reply["cache"]))
        return cache

    def forward(
        self, inputs_embeds: Floats, positions: Ints, cache: Cache, logits_index: Ints, captures: bool = False
    ) -> StepOutput:
        """See `Backend.forward`."""
        assert isinstance(cache, EmulatedCache)
        start, stop = cache.start, cache.start + len(cache.lengths)
        call = {"do": "forward", "cache": cache.number, "start": start, "stop": stop, "captures": captures}
        given: Arrays = {"inputs_embeds": inputs_embeds, "positions": positions, "logits_index": logits_index}
        _, found = self.ask(call, given)
        cache.lengths += positions.shape[1]

        def layers(kind: str) -> dict[int, np.ndarray]:
            return {int(name.partition(".")[2]): found[name] for name in found if name.startswith(f"{kind}.")}

        return StepOutput(found["logits"], layers("expert_id"), layers("hidden"))

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
