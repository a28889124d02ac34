"""How much a layer's output in the residual stream changes when a group of its matrices is stored in another form.

Measured on the reference's own inputs, one group at a time; rounding of activations inside a kernel is not part of it.
Groups are a decoder layer's of `profiles/groups.py`: attention, shared_expert or mlp, experts.
Legend: N output features, K input features, T tokens, H hidden, n tokens of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from arriero.export.proof.routed_rows import Routed, expert_output
from arriero.export.proof.walk_layers import Walk
from arriero.graphs.names import expert_tensors

Floats = NDArray[np.float32]
Stored = Callable[[str, int | None], Floats]  # tensor, expert -> the values [N, K] that it is stored as
SAMPLES = 32  # a forward pass of the layer for each group and candidate; more would not change an order of magnitude


def linear_error(walk: Walk, layer: int, weights: Mapping[str, Floats]) -> float:
    """Relative squared error of `layer`'s output with these weights (tensor -> [N, K]) in place of its own.

    Over at most `SAMPLES` calibration samples, spread evenly; the walk must have just observed the layer.
    """
    before, after = (np.load(walk.hidden_file(number), mmap_mode="r") for number in (layer, layer + 1))
    error = total = 0.0
    count = len(walk.bounds) - 1
    with _replaced(walk.model, weights):
        for sample in np.unique(np.linspace(0, count - 1, min(count, SAMPLES)).astype(int)):
            rows = slice(walk.bounds[sample], walk.bounds[sample + 1])
            changed, _ = walk.step(layer, np.array(before[rows]))
            error += float(np.sum((changed - after[rows]).astype(np.float64) ** 2))
            total += float(np.sum(after[rows].astype(np.float64) ** 2))
    return error / total


def expert_errors(walk: Walk, layer: int, routed: Routed, exact: Stored, forms: Sequence[Stored]) -> list[float]:
    """The same for each of `forms` of all experts, over every routed row, one expert in memory at a time.

    Experts add to the residual stream and change no routing of their layer, so the rows they read stay the same. Where
    a token has several experts, their errors are taken as independent.
    """
    gate_up, down = expert_tensors(layer)
    errors = np.zeros(len(forms))
    for expert in range(walk.text.experts):
        if not (routed.expert == expert).any():
            continue
        kept = exact(gate_up, expert), exact(down, expert)
        for number, form in enumerate(forms):
            stored = form(gate_up, expert), form(down, expert)
            for rows, _ in routed.of(expert).pieces():
                change = expert_output(rows, *stored) - expert_output(rows, *kept)
                errors[number] += np.sum(change.astype(np.float64) ** 2)
    after = np.load(walk.hidden_file(layer + 1), mmap_mode="r")
    total = sum(float(np.sum(piece.astype(np.float64) ** 2)) for piece in np.array_split(after, 16))
    return [float(error) for error in errors / total]


@contextmanager
def _replaced(model: nn.Module, weights: Mapping[str, Floats]) -> Iterator[None]:
    """Within the block the parameters named in `weights` have these values."""
    kept = {}
    for tensor, values in weights.items():
        owner, _, leaf = tensor.removeprefix("language_model.").rpartition(".")
        module = model.get_submodule(owner)
        kept[tensor] = (module, leaf, getattr(module, leaf))
        setattr(module, leaf, nn.Parameter(torch.from_numpy(np.ascontiguousarray(values)), requires_grad=False))
    try:
        yield
    finally:
        for module, leaf, parameter in kept.values():
            setattr(module, leaf, parameter)
