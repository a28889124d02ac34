"""The most bytes of text that one token stands for, so that bytes say how few tokens a text can become."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer, models
from tokenizers.pre_tokenizers import ByteLevel


def longest_token(tokenizer: Tokenizer, added: Mapping[int, AddedToken]) -> int | None:
    """Give the bytes of the longest token; None where a token may stand for a text of any length.

    That is so unless all bytes of a text come out as tokens: a normaliser, a splitter that removes letters, an unknown
    token and added tokens that take the spaces beside them all let some go.
    """
    own = tokenizer.get_vocab(with_added_tokens=False)
    keeps_bytes = (
        isinstance(tokenizer.model, models.BPE)
        and tokenizer.normalizer is None
        and _keeps_bytes(tokenizer)
        and own.keys() >= set(ByteLevel.alphabet())  # a letter for each byte
        and not any(token.lstrip or token.rstrip for token in added.values())
    )
    if not keeps_bytes:
        return None
    return max(*map(len, own), *(len(token.content.encode()) for token in added.values()))


def _keeps_bytes(tokenizer: Tokenizer) -> bool:
    """Whether the splitter hands every byte of a text on, each as a letter of its own."""
    if tokenizer.pre_tokenizer is None:
        return False
    whole: dict[str, Any] = json.loads(tokenizer.pre_tokenizer.__getstate__())
    steps = whole["pretokenizers"] if whole["type"] == "Sequence" else [whole]
    return any(step["type"] == "ByteLevel" for step in steps) and all(
        step["type"] in ("ByteLevel", "Digits") or (step["type"] == "Split" and step["behavior"] != "Removed")
        for step in steps
    )
