"""How much the reference holds at a time: of a quantised checkpoint decoded, in float32, and of logits."""

from __future__ import annotations

import re
from collections.abc import Iterable

from arriero.graphs.names import EMBEDDING, HEAD, TEXT_PREFIX
from arriero.graphs.sources.weight_source import WeightSource
from arriero.profiles.groups import LAYER

ROOM = 2 << 30  # bytes of decoded weights
LOGITS = 256 << 20  # bytes of the logits of cases that go through the head together
VOCABULARY = 4096  # rows of the head at a time
LAYERS = f"{TEXT_PREFIX}model.layers"  # the module that holds the decoder's layers


def is_decoded(source: WeightSource) -> bool:
    """Whether a tensor takes memory of its own to be read, rather than a map of its file."""
    return source.place is None


def group_of(name: str) -> str:
    """The path of the module with whose call a decoded tensor is needed; empty for those that are small or always.

    Of a decoder layer all matrices together and the experts apart; the embedding and the head by themselves.
    """
    if name in (EMBEDDING, HEAD):
        return name.removesuffix(".weight")
    match = re.match(LAYER, name)
    if match is None:
        return ""
    layer = f"{LAYERS}.{match['layer']}"
    return f"{layer}.feed_forward" if ".experts." in name else layer


def decoded_memory(used: Iterable[WeightSource], whole: bool) -> int:
    """The most bytes of decoded weights that the reference holds at a time.

    `whole`: whether it runs whole layers, in place of going through them expert by expert.
    """
    groups: dict[str, int] = {}
    for source in used:
        group = group_of(source.name)
        if is_decoded(source) and (whole or not group.endswith(".feed_forward")):
            needed = group.removesuffix(".feed_forward")  # a layer that runs needs its experts beside its matrices
            groups[needed] = groups.get(needed, 0) + source.nbytes
    outside = groups.pop("", 0)
    return outside + min(sum(groups.values()), max(ROOM, max(groups.values(), default=0)))
