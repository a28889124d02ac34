"""Answers a backend's calls over a pipe: what `export/proof/emulate.py` runs on the processor that a bundle is for.

    python -m arriero.runtimes.remote BUNDLE THREADS

A message is one npz archive behind its length (8 bytes, little-endian): arrays by name, and under `call` what is asked,
as JSON. The answer is one too; a refusal has the key `error`. The caches stay on this side, and calls name them by
number.
"""

from __future__ import annotations

import io
import itertools
import json
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from arriero.errors import ArrieroError
from arriero.runtimes.api import open_bundle_backend
from arriero.runtimes.backend import Backend, BackendOptions, Cache, ForcesRouting, ModelSpec
from arriero.runtimes.integrity import open_manifest
from arriero.runtimes.machine_fit import check_machine
from arriero.runtimes.snapshot import Snapshot
from arriero.runtimes.steps import forces_routing

Arrays = dict[str, np.ndarray]


def write_message(stream: IO[bytes], call: Any, arrays: Arrays) -> None:
    """Send `call` (JSON values) with `arrays`."""
    body = io.BytesIO()
    content: dict[str, Any] = {"call": np.frombuffer(json.dumps(call).encode(), np.uint8), **arrays}
    np.savez(body, **content)
    stream.write(struct.pack("<q", body.tell()))
    stream.write(body.getvalue())
    stream.flush()


def read_message(stream: IO[bytes]) -> tuple[Any, Arrays]:
    """Receive what `write_message` sent. Raises EOFError when the other side is gone."""
    head = stream.read(8)
    if len(head) < 8:
        raise EOFError
    with np.load(io.BytesIO(stream.read(struct.unpack("<q", head)[0]))) as archive:
        arrays = {name: archive[name] for name in archive.files}
    return json.loads(arrays.pop("call").tobytes()), arrays


def layer_arrays(kind: str, arrays: Mapping[int, np.ndarray]) -> Arrays:
    """An array for each layer as a message carries them, under `kind` and the layer's number."""
    return {f"{kind}.{layer}": array for layer, array in arrays.items()}


def read_layers(kind: str, arrays: Arrays) -> dict[int, np.ndarray]:
    """The inverse of `layer_arrays`."""
    return {int(name.partition(".")[2]): arrays[name] for name in arrays if name.startswith(f"{kind}.")}


def snapshot_arrays(snapshot: Snapshot) -> Arrays:
    """The keys and values of a snapshot as a message carries them; the length goes beside them."""
    return layer_arrays("key", dict(enumerate(snapshot.keys))) | layer_arrays("value", dict(enumerate(snapshot.values)))


def read_snapshot(spec: ModelSpec, length: int, arrays: Arrays) -> Snapshot:
    """The inverse of `snapshot_arrays`, for a row of `length` tokens of the model `spec`."""
    layers = range(len(spec.layers))
    keys, values = (tuple(arrays[f"{kind}.{layer}"] for layer in layers) for kind in ("key", "value"))
    return Snapshot(spec, length, keys, values)


class Server:
    """One backend and the caches that the other side asked for."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.caches: dict[int, Cache] = {}
        self.numbers = itertools.count()

    def answer(self, call: dict[str, Any], arrays: Arrays) -> tuple[Any, Arrays]:
        """Do what is asked, after letting go of the caches that the other side dropped."""
        for number in call["dropped"]:
            del self.caches[number]
        match call["do"]:
            case "vision":
                return {}, {"image_features": self.backend.vision(arrays["pixel_values"])}
            case "embed":
                return {}, {"inputs_embeds": self.backend.embed(arrays["input_ids"], arrays["image_features"])}
            case "new_cache":
                number = next(self.numbers)
                self.caches[number] = self.backend.new_cache(call["batch"], call["capacity"])
                return {"cache": number}, {}
        cache = self.caches[call["cache"]]
        match call["do"]:
            case "copy_row":
                cache.copy_row(call["source"], call["target"])
            case "truncate":
                cache.truncate(call["row"], call["length"])
            case "snapshot":
                snapshot = cache.snapshot(call["row"], call["start"])
                return {"length": snapshot.length}, snapshot_arrays(snapshot)
            case "restore":
                cache.restore(call["row"], read_snapshot(self.backend.spec, call["length"], arrays))
            case "forward":
                return {}, self._forward(cache.rows(call["start"], call["stop"]), arrays, call["captures"])
            case "forward_forced":
                return {}, self._forward_forced(cache.rows(call["start"], call["stop"]), arrays)
        return {}, {}

    def _forward(self, cache: Cache, arrays: Arrays, captures: bool) -> Arrays:
        cache.adapters[:] = arrays["adapters"]
        embeds, positions = arrays["inputs_embeds"], arrays["positions"]
        step = self.backend.forward(embeds, positions, cache, arrays["logits_index"], captures)
        captured = layer_arrays("expert_id", step.expert_ids) | layer_arrays("hidden", step.hiddens)
        return {"logits": step.logits, **captured}

    def _forward_forced(self, cache: Cache, arrays: Arrays) -> Arrays:
        assert isinstance(self.backend, ForcesRouting)
        cache.adapters[:] = arrays["adapters"]
        step = arrays["inputs_embeds"], arrays["positions"], cache, arrays["logits_index"]
        return {"logits": self.backend.forward_forced(*step, read_layers("expert_id", arrays))}


def main() -> None:
    """Open the bundle with all its checks, then answer until the other side closes."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    try:
        manifest = open_manifest(Path(sys.argv[1]))
        check_machine(manifest)
        options = BackendOptions(threads=int(sys.argv[2]))
        server = Server(open_bundle_backend(manifest, options))
    except ArrieroError as error:
        write_message(answers, {"error": str(error)}, {})
        return
    write_message(answers, {"forces_routing": forces_routing(server.backend)}, {})
    while True:
        try:
            call, arrays = read_message(requests)
        except EOFError:
            return
        try:
            reply, results = server.answer(call, arrays)
        except (ArrieroError, ValueError) as error:
            reply, results = {"error": str(error)}, {}
        write_message(answers, reply, results)


if __name__ == "__main__":
    main()
