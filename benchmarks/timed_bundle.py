"""A bundle as a contender: what is asked of it, a worker process that answers, and what a token has to read and do."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from contenders import Worker

from arriero.export.proof.compare import decoder_bytes, layer_weights
from arriero.runtimes.manifest import Manifest


@dataclass(frozen=True)
class Case:
    """`tokens` of a prompt read at once, or decoded in each of `rows` with `depth` others before them."""

    kind: Literal["prefill", "decode"]
    tokens: int
    depth: int = 0
    rows: int = 1

    def __str__(self) -> str:
        if self.kind == "prefill":
            return f"prefill of {self.tokens:,}"
        return (
            "decode" + (f", {self.rows} rows" if self.rows > 1 else "") + (f" after {self.depth:,}" * bool(self.depth))
        )


class Bundle:
    """A bundle in a worker process."""

    def __init__(self, path: Path, threads: int) -> None:
        self.worker = Worker(__file__, str(path), str(threads))
        self.ready: dict[str, float] = self.worker.ready
        self.manifest = Manifest.read(path)

    def bytes_per_step(self, case: Case) -> int:
        """Bytes that a decode step of the case's rows touches."""
        return touched_bytes(self.manifest, case.rows) + case.rows * cache_bytes(self.manifest, case.depth)

    def operations(self, case: Case) -> int:
        """Multiplications and additions of the case's prompt with the layers' matrices, each layer's of each token."""
        return 2 * case.tokens * layer_weights(self.manifest.weights, used_share(self.manifest, 1))

    def measure(self, case: Case) -> float:
        """Tokens per second of all rows together."""
        answer: float = self.worker.ask(asdict(case))
        return answer


def touched_bytes(manifest: Manifest, rows: int = 1) -> int:
    """Bytes of weights that a decode step of so many rows reads, each row drawing its experts evenly."""
    return decoder_bytes(manifest.weights, used_share(manifest, rows))


def used_share(manifest: Manifest, rows: int) -> float:
    """The share of a layer's experts that so many tokens use, each drawing its own evenly."""
    model = manifest.model
    share = model.num_experts_per_tok / model.num_local_experts if model.num_local_experts else 1.0
    return 1 - (1 - share) ** rows


def cache_bytes(manifest: Manifest, depth: int) -> int:
    """Bytes of keys and values that the token after `depth` others reads."""
    model = manifest.model
    held = {"chunked": depth % model.attention_chunk_size, "global": depth}
    return sum(manifest.kv_bytes_per_token[layer.attention] * held[layer.attention] for layer in model.layers)


def serve(bundle: Path, threads: int) -> None:
    """The worker: opens the bundle, then answers a case on a line with tokens per second."""
    from arriero import load
    from arriero.runtimes.backend import Backend, Cache
    from arriero.runtimes.processor.processor import Prompt
    from arriero.runtimes.snapshot import Snapshot
    from arriero.runtimes.steps import append_tokens

    started = time.perf_counter()
    session = load(bundle, threads)
    loaded = time.perf_counter() - started
    rng = np.random.default_rng(0)
    special = {session.spec.image_token_id, *session.spec.eos_token_ids}
    ordinary = np.array([token for token in range(session.spec.vocab_size) if token not in special])
    read: dict[int, Snapshot] = {}  # by depth: read once, not in every round

    def prefill(tokens: int) -> Snapshot:
        cache = session.prefill(Prompt(rng.choice(ordinary, max(1, tokens)), None)).cache
        return session.engine.run(lambda _: cache.snapshot(0))

    def copies(backend: Backend, snapshot: Snapshot, case: Case) -> Cache:
        cache = backend.new_cache(case.rows, snapshot.length + case.tokens)
        for row in range(case.rows):
            cache.restore(row, snapshot)
        return cache

    def measure(case: Case) -> float:
        if case.kind == "prefill":
            start = time.perf_counter()
            session.prefill(Prompt(rng.choice(ordinary, case.tokens), None))
            return case.tokens / (time.perf_counter() - start)
        if case.depth not in read:
            read[case.depth] = prefill(case.depth)
        cache = session.engine.run(partial(copies, snapshot=read[case.depth], case=case))
        drawn = rng.choice(ordinary, (case.tokens, case.rows)).tolist()
        start = time.perf_counter()
        for tokens in drawn:
            session.engine.run(partial(append_tokens, tokens=tokens, cache=cache))
        return case.tokens * case.rows / (time.perf_counter() - start)

    measure(Case("prefill", 16))
    measure(Case("decode", 4))
    print(json.dumps({"load_s": loaded, "rss_mib": resident_mib()}), flush=True)
    for line in sys.stdin:
        print(json.dumps(measure(Case(**json.loads(line)))), flush=True)


def resident_mib() -> float:
    """Resident memory of this process, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
