"""Rounds the head by what goes into it: the last hidden states of all samples, normed.

Its rows do not depend on each other, so they are read, widened and rounded a slice at a time.
Legend: T tokens of all samples, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from arriero.export.calibration.estimate import HEAD_SLICE
from arriero.export.calibration.round_matrices import Form, Rounded, Rounder
from arriero.export.proof.walk_layers import Progress, Walk
from arriero.graphs.names import HEAD
from arriero.profiles.moments import ROWS, Moments, check_finite
from arriero.profiles.quantize import Quantized
from arriero.profiles.quantized_weights import RoundingRecord


def round_head(walk: Walk, forms: Mapping[str, Form], progress: Progress) -> Iterator[Rounded]:
    """What each of `forms` makes of the head; the walk must have gone through all layers.

    Progress counts rows. Raises ArrieroError for activations that are not finite.
    """
    vocabulary, rows = walk.text.vocab_size, max(1, HEAD_SLICE // walk.text.hidden_size)
    seen, total = head_moments(walk), vocabulary * len(forms)
    for number, (key, form) in enumerate(forms.items()):
        rounder, slices = Rounder({key: form}, ()), list[Rounded]()
        for start in range(0, vocabulary, rows):
            progress(number * vocabulary + start, total)
            weight = partial(walk.head, start, min(start + rows, vocabulary))
            slices += [one for one in rounder.round(HEAD, None, weight, seen) if isinstance(one, Rounded)]
        yield _joined(slices)
    progress(total, total)


def head_moments(walk: Walk) -> Moments:
    """The moments of what the head reads of every token."""
    hidden = np.load(walk.hidden_file(len(walk.text.layers)), mmap_mode="r")
    counts = np.diff(walk.bounds).tolist()
    names = [sample.name for sample, count in zip(walk.samples, counts, strict=True) for _ in range(count)]
    seen = Moments(walk.text.hidden_size, second=True)
    for start in range(0, walk.tokens, ROWS):
        rows = walk.normed(np.array(hidden[start : start + ROWS]))
        check_finite(rows, "input of the head", names[start : start + ROWS])
        seen.add(rows)
    return seen


def _joined(slices: Sequence[Rounded]) -> Rounded:
    """The whole head of its slices; its gain is their mean, each counted by its rows."""
    values = [one.values for one in slices if isinstance(one.values, Quantized)]
    packed, scales = (np.concatenate([getattr(one, kind) for one in values]) for kind in ("packed", "scales"))
    whole = replace(values[0], packed=packed, scales=scales)
    notes, counts = [one.note for one in slices], [len(one.scales) for one in values]
    gains = [1.0 if note.gain is None else note.gain for note in notes]
    known = any(note.gain is not None for note in notes)
    note: RoundingRecord = replace(
        notes[0],
        rounding="gptq" if any(note.rounding == "gptq" for note in notes) else "nearest",
        gain=float(np.average(gains, weights=counts)) if known else None,
    )
    return Rounded(slices[0].form, whole, note)
