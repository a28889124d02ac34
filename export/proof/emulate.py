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
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from arriero.errors import ArrieroError, MachineLacks
from arriero.runtimes.backend import Cache, Floats, Ints, ModelSpec, StepOutput
from arriero.runtimes.cache_rows import CacheRows, RowStore
from arriero.runtimes.cpu import architecture
from arriero.runtimes.remote import (
    Arrays,
    layer_arrays,
    read_layers,
    read_message,
    read_snapshot,
    snapshot_arrays,
    write_message,
)
from arriero.runtimes.snapshot import Snapshot
from arriero.traits import PREFILL_PIECE

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


class EmulatedCache(RowStore):
    """A cache on the other side, known by its number; only its lengths and adapters are kept on this side as well."""

    def __init__(self, owner: EmulatedBackend, number: int, batch: int, capacity: int) -> None:
        """Stand for the empty cache `number` of `owner`'s process."""
        super().__init__(owner.spec, batch, capacity)
        self.owner, self.number = owner, number

    def reserve(self, tokens: int) -> None:
        """Leave it to the other side, which has slots made for each step."""

    def copy_row(self, source: int, target: int) -> None:
        """Make row `target` hold what row `source` holds."""
        self.owner.ask({"do": "copy_row", "cache": self.number, "source": source, "target": target})
        self.lengths[target] = self.lengths[source]

    def truncate(self, row: int, length: int) -> None:
        """Keep the first `length` tokens of `row`."""
        self.owner.ask({"do": "truncate", "cache": self.number, "row": row, "length": length})
        super().truncate(row, length)

    def snapshot(self, row: int, start: int = 0) -> Snapshot:
        """Bring a copy of what `row` holds of the tokens from `start` on to this side."""
        reply, arrays = self.owner.ask({"do": "snapshot", "cache": self.number, "row": row, "start": start})
        return replace(read_snapshot(self.spec, reply["length"], arrays), start=start)

    def restore(self, row: int, snapshot: Snapshot) -> None:
        """Make `row` hold what `snapshot` was taken of; the other side checks dtype and capacity."""
        call = {"do": "restore", "cache": self.number, "row": row, "length": snapshot.length}
        self.owner.ask(call, snapshot_arrays(snapshot))
        self.lengths[row] = snapshot.length


class EmulatedBackend:
    """The backend of a foreign bundle, in an emulated process. Calls of several threads are answered in turn."""

    piece, few_rows = PREFILL_PIECE, 0

    def __init__(self, bundle: Path, spec: ModelSpec, arch: str) -> None:
        """Start the process; it opens the bundle with all the checks of a device. Raises what it refuses."""
        self.spec = spec
        folder = check_emulation(arch, str(bundle))
        command = emulated(folder, ["-m", "arriero.runtimes.remote", str(bundle.absolute()), "1"])
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=folder)
        self._lock = threading.Lock()
        self._dropped: list[int] = []  # caches that nobody holds any more; the next call says so
        self.forces_routing = bool(self._receive()[0]["forces_routing"])

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
        return self.ask({"do": "vision"}, {"pixel_values": pixel_values})[1]["image_features"]

    def embed(self, input_ids: Ints, image_features: Floats) -> Floats:
        """See `Backend.embed`."""
        arrays: Arrays = {"input_ids": input_ids, "image_features": image_features}
        return self.ask({"do": "embed"}, arrays)[1]["inputs_embeds"]

    def new_cache(self, batch: int, capacity: int) -> CacheRows[EmulatedCache]:
        """See `Backend.new_cache`."""
        reply, _ = self.ask({"do": "new_cache", "batch": batch, "capacity": capacity})
        cache = EmulatedCache(self, reply["cache"], batch, capacity)
        # views of rows hold the store, so it lives as long as anyone may still step the cache
        weakref.finalize(cache, lambda: self._dropped.append(reply["cache"]))
        return CacheRows.whole(cache)

    def forward(
        self, inputs_embeds: Floats, positions: Ints, cache: Cache, logits_index: Ints, captures: bool = False
    ) -> StepOutput:
        """See `Backend.forward`."""
        arguments: Arrays = {"inputs_embeds": inputs_embeds, "positions": positions, "logits_index": logits_index}
        outputs = self._forward({"do": "forward", "captures": captures}, arguments, cache)
        return StepOutput(outputs["logits"], read_layers("expert_id", outputs), read_layers("hidden", outputs))

    def forward_forced(
        self, inputs_embeds: Floats, positions: Ints, cache: Cache, logits_index: Ints, expert_ids: Mapping[int, Ints]
    ) -> Floats:
        """See `ForcesRouting.forward_forced`."""
        arguments: Arrays = {"inputs_embeds": inputs_embeds, "positions": positions, "logits_index": logits_index}
        arguments |= layer_arrays("expert_id", expert_ids)
        return self._forward({"do": "forward_forced"}, arguments, cache)["logits"]

    def _forward(self, call: dict[str, Any], arguments: Arrays, cache: Cache) -> Arrays:
        assert isinstance(cache, CacheRows)
        store = cache.store
        assert isinstance(store, EmulatedCache)
        place = {"cache": store.number, "start": cache.start, "stop": cache.stop}
        _, outputs = self.ask({**call, **place}, {**arguments, "adapters": cache.adapters})
        cache.lengths += arguments["positions"].shape[1]
        return outputs

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
