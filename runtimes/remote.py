"""Answers a backend's calls over a pipe: what `export/proof/emulate.py` runs on the processor that a bundle is for.

    python -m arriero.runtimes.remote BUNDLE THREADS

A message is one npz archive behind its length (8 bytes, little-endian): arrays by name, and under `call` what is asked,
as JSON. The answer is one too; a refusal has the key `error`. Caches live here and are known by number.
"""

from __future__ import annotations

import io
import itertools
import json
import struct
import sys
from pathlib import Path
from typing import IO, Any

import numpy as np

from arriero.errors import ArrieroError
from arriero.runtimes.api import open_backend
from arriero.runtimes.backend import Backend, Cache
from arriero.runtimes.integrity import open_manifest
from arriero.runtimes.machine_fit import check_machine

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
                return {}, {"found": self.backend.vision(arrays["pixel_values"])}
            case "embed":
                return {}, {"found": self.backend.embed(arrays["input_ids"], arrays["image_features"])}
            case "new_cache":
                number = next(self.numbers)
                self.caches[number] = self.backend.new_cache(call["batch"], call["capacity"])
                return {"cache": number}, {}
            case "copy_row":
                self.caches[call["cache"]].copy_row(call["source"], call["target"])
                return {}, {}
        cache = self.caches[call["cache"]].rows(call["start"], call["stop"])
        embeds, positions = arrays["inputs_embeds"], arrays["positions"]
        step = self.backend.forward(embeds, positions, cache, arrays["logits_index"], call["captures"])
        found: Arrays = {"logits": step.logits}
        found |= {f"expert_id.{layer}": ids for layer, ids in step.expert_ids.items()}
        found |= {f"hidden.{layer}": hidden for layer, hidden in step.hiddens.items()}
        return {}, found


def main() -> None:
    """Open the bundle with all its checks, then answer until the other side closes."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    try:
        manifest = open_manifest(Path(sys.argv[1]))
        check_machine(manifest)
        server = Server(open_backend(manifest.target.backend, manifest.bundle, manifest.model, int(sys.argv[2])))
    except ArrieroError as error:
        write_message(answers, {"error": str(error)}, {})
        return
    write_message(answers, {}, {})
    while True:
        try:
            call, arrays = read_message(requests)
        except EOFError:
            return
        try:
            reply, found = server.answer(call, arrays)
        except (ArrieroError, ValueError) as error:
            reply, found = {"error": str(error)}, {}
        write_message(answers, reply, found)


if __name__ == "__main__":
    main()
