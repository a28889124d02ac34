"""What a step that checks drafted tokens costs beside one of a single token, and so how many must be right to pay.

    python benchmarks/random_model.py bundles/mini
    arriero build benchmarks/speed.yaml
    python benchmarks/draft_cost.py bundles/speed/tvm-int4

In every round each number of drafts is timed in turn, on a random prompt and with random drafts, which draw experts as
evenly as they come; text that is drafted well repeats itself and draws fewer. Medians over the rounds; the share that
must be right is that of the drafts, all or none of which are: what a step costs more, over what it may bring.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from functools import partial
from pathlib import Path

import numpy as np
from contenders import read_anew

from arriero import load
from arriero.runtimes.processor.processor import Prompt
from arriero.runtimes.steps import append_rows


def main() -> None:
    """Parse the command line, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--drafts", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8])
    parser.add_argument("--depth", type=int, default=256, help="tokens before them")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    read_anew(options.bundle)
    draw = np.random.default_rng(0)
    with load(options.bundle, options.threads) as session:
        special = {session.spec.image_token_id, *session.spec.eos_token_ids}
        ordinary = np.array([token for token in range(session.spec.vocab_size) if token not in special])
        cache = session.prefill(Prompt(draw.choice(ordinary, options.depth), None)).cache
        seconds: dict[int, list[float]] = {drafts: [] for drafts in (0, *options.drafts)}
        for _ in range(options.rounds):
            for drafts, times in seconds.items():
                tokens = draw.choice(ordinary, 1 + drafts).tolist()
                start = time.perf_counter()
                session.engine.run(partial(append_rows, tokens=[tokens], cache=cache))
                times.append(time.perf_counter() - start)
                cache.truncate(0, options.depth)
    alone = seconds[0]
    print(f"{'drafts':>6} {'ms':>7} {'of one token':>12} {'must be right':>13}")
    for drafts, times in seconds.items():
        ratio = statistics.median(with_drafts / one for with_drafts, one in zip(times, alone, strict=True))
        share = f"{(ratio - 1) / drafts:13.0%}" if drafts else ""
        print(f"{drafts:6} {1000 * statistics.median(times):7.2f} {ratio:12.2f} {share}")


if __name__ == "__main__":
    main()
