"""Training batches: conversations as padded token ids with the answers marked, and their image tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from arriero.profiles.data import Sample
from arriero.runtimes.processor.processor import Processor

ANSWER_OPENS = "<|header_start|>assistant<|header_end|>\n\n"
ANSWER_ENDS = "<|eot|>"


IGNORED = -100


@dataclass(frozen=True)
class Row:
    """One conversation: `input_ids` [S], `targets` [S] (the next token where an answer says it, else -100), tiles."""

    input_ids: Tensor
    targets: Tensor
    pixel_values: Tensor | None


@dataclass(frozen=True)
class Batch:
    """`input_ids`, `targets`, `real` (not padding) [B, S], first positions `starts` [B], tiles [n, 3, h, w] or None."""

    input_ids: Tensor
    targets: Tensor
    real: Tensor
    starts: Tensor
    pixel_values: Tensor | None


def encode(sample: Sample, processor: Processor) -> Row:
    """A whole conversation as one row."""
    prompt = processor.encode(sample.conversation, sample.images)
    ids = torch.from_numpy(prompt.input_ids)
    opens, ends = (processor.tokenize(text, special_tokens=True) for text in (ANSWER_OPENS, ANSWER_ENDS))
    said = mark_answers(prompt.input_ids, opens, int(ends[0]))
    targets = torch.where(torch.from_numpy(said), ids, IGNORED)
    tiles = None if prompt.pixel_values is None else torch.from_numpy(prompt.pixel_values)
    return Row(ids, torch.cat([targets[1:], torch.tensor([IGNORED])]), tiles)


def collate(rows: Sequence[Row], starts: np.ndarray) -> Batch:
    """Rows right-padded to the longest, as one batch; `starts` are their first positions."""
    tiles = [row.pixel_values for row in rows if row.pixel_values is not None]
    return Batch(
        pad_sequence([row.input_ids for row in rows], batch_first=True),
        pad_sequence([row.targets for row in rows], batch_first=True, padding_value=IGNORED),
        pad_sequence([torch.ones_like(row.input_ids, dtype=torch.bool) for row in rows], batch_first=True),
        torch.from_numpy(starts),
        torch.cat(tiles) if tiles else None,
    )


def mark_answers(ids: np.ndarray, opens: np.ndarray, ends: int) -> np.ndarray:
    """Which of `ids` [S] an assistant says: bool [S], true after each `opens` up to and with the next `ends`."""
    marked = np.zeros(len(ids), bool)
    windows = np.lib.stride_tricks.sliding_window_view(ids, len(opens))
    for start in np.flatnonzero((windows == opens).all(axis=1)) + len(opens):
        stops = np.flatnonzero(ids[start:] == ends)
        if len(stops):
            marked[start : start + stops[0] + 1] = True
    return marked
