"""How much of a quantised checkpoint the reference holds decoded, in float32, at a time."""

from __future__ import annotations

import re
from collections.abc import Iterable

from arriero.graphs.sources.weight_source import WeightSource
from arriero.profiles.groups import LAYER

ROOM = 2 << 30  # bytes of decoded weights


def is_decoded(source: WeightSource) -> bool:
    """Whether a tensor takes memory of its own to be read, rather than a map of its file."""
    return source.place is None


def decoded_memory(used: Iterable[WeightSource]) -> int:
    """The most bytes of decoded weights that the reference holds at a time."""
    layers: dict[str, int] = {}
    for source in used:
        if is_decoded(source):
            key = layer_of(source.name)
            layers[key] = layers.get(key, 0) + source.nbytes
    outside = layers.pop("", 0)
    return outside + min(sum(layers.values()), max(ROOM, max(layers.values(), default=0)))


def layer_of(name: str) -> str:
    """The decoder layer that a tensor is of, empty for all others."""
    match = re.match(LAYER, name)
    return "" if match is None else match["layer"]
