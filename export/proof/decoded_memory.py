"""How much the reference holds at a time: of a quantised checkpoint decoded, in float32, and of logits."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence

from arriero.graphs.config import TextConfig
from arriero.graphs.names import EMBEDDING, HEAD, TEXT_PREFIX
from arriero.graphs.sources.weight_source import WeightSource
from arriero.profiles.groups import LAYER

ROOM = 2 << 30  # bytes of decoded weights that may stay
LOGITS = 256 << 20  # bytes of the logits of cases that go through the head together, where a layer is no larger
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


def fits(used: Iterable[WeightSource]) -> bool:
    """Whether all that is decoded stays once it is there; else nothing stays that is not needed right then."""
    return sum(source.nbytes for source in used if is_decoded(source)) <= ROOM


def decoded_memory(used: Collection[WeightSource], whole: bool) -> tuple[int, int]:
    """The most bytes of decoded weights that the reference holds while it embeds, and afterwards.

    `whole`: whether it runs whole layers and the head, in place of going through experts and rows one by one.
    """
    groups: dict[str, int] = {}
    for source in used:
        group = group_of(source.name)
        if is_decoded(source) and (whole or not (group.endswith(".feed_forward") or source.name == HEAD)):
            needed = group.removesuffix(".feed_forward")  # a layer that runs needs its experts beside its matrices
            groups[needed] = groups.get(needed, 0) + source.nbytes
    outside = groups.pop("", 0)
    embedding = groups.get(group_of(EMBEDDING), 0)
    if fits(used):
        return outside + embedding, outside + sum(groups.values())
    groups.pop(group_of(EMBEDDING), None)
    return outside + embedding, outside + max(groups.values(), default=0)


def logit_groups(lengths: Sequence[int], text: TextConfig) -> Iterator[range]:
    """The cases, of these numbers of tokens, whose logits are made together, or one case.

    They take `LOGITS` bytes, or as many as a layer's matrices did before them. The head is read for each group.
    """
    width = text.expert_ffn if len(text.moe_layers) == len(text.layers) else max(text.dense_ffn, text.expert_ffn)
    layer = 4 * text.hidden_size * (2 * (text.heads + text.kv_heads) * text.head_dim + 3 * width)
    most, start, tokens = max(LOGITS, layer) // (4 * text.vocab_size), 0, 0
    for number, length in enumerate(lengths):
        if number > start and tokens + length > most:
            yield range(start, number)
            start, tokens = number, 0
        tokens += length
    if start < len(lengths):
        yield range(start, len(lengths))
