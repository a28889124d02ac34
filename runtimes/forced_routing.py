"""Expert ids that tokens are sent to in the place of their routers' choice, as inputs of a text graph.

Shapes: B batch rows, S new tokens per row, T = B*S, k experts per token, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from arriero.errors import ArrieroError
from arriero.runtimes.backend import Ints, ModelSpec

PREFIX = "forced_expert_id."  # and a layer's number: the input i64 [T, k] of a graph


def takes_routing(spec: ModelSpec, inputs: Iterable[str]) -> bool:
    """Whether a text graph with these inputs lets its MoE layers' routing be forced; graphs of older bundles do not."""
    needs = {f"{PREFIX}{layer}" for layer in moe_layers(spec)}
    return bool(needs) and needs <= set(inputs)


def moe_layers(spec: ModelSpec) -> tuple[int, ...]:
    """The numbers of the layers that route."""
    return tuple(number for number, layer in enumerate(spec.layers) if layer.ffn == "moe")


def forced_inputs(spec: ModelSpec, expert_ids: Mapping[int, Ints], rows: int, steps: int) -> dict[str, Ints]:
    """The inputs that send each token of a step to `expert_ids` [B, S, k], by layer; -1 leaves it to the router.

    Raises ArrieroError for ids that do not fit the step, and for experts that do not exist: kernels do not check them.
    """
    inputs, shape = {}, (rows, steps, spec.num_experts_per_tok)
    for layer in moe_layers(spec):
        ids = np.asarray(expert_ids[layer], np.int64) if layer in expert_ids else None
        if ids is None or ids.shape != shape:
            raise ArrieroError(
                f"{'no expert ids' if ids is None else f'expert ids of shape {list(ids.shape)}'} for a step",
                where=f"layer {layer}",
                expected=f"shape {list(shape)}: rows, tokens, experts per token",
            )
        if ids.size and (ids.min() < -1 or ids.max() >= spec.num_local_experts):
            raise ArrieroError(
                f"expert ids from {ids.min()} to {ids.max()}",
                where=f"layer {layer}",
                expected=f"0 to {spec.num_local_experts - 1}, or -1",
                remedy="They are not of this model: copy the reference record again, or write it anew with "
                "`arriero build`",
            )
        inputs[f"{PREFIX}{layer}"] = ids.reshape(rows * steps, -1)
    return inputs
