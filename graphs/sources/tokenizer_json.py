"""The text of a tokenizer.json, as the `tokenizers` library reads it, of a byte-level vocabulary that is split as
Llama 4's is.

Where a checkpoint brings no tokenizer.json: Meta's own file, and GGUF, which spells the same in lists.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

# How Meta's tokenizer cuts a text before it merges bytes, as a regular expression: words with the mark before them and
# an English ending, up to three digits, marks, ends of lines, spaces.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE, _ENDING = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
WORDS = "|".join(
    [
        f"{_BEFORE}{_UPPER}*{_LOWER}+{_ENDING}",
        f"{_BEFORE}{_UPPER}+{_LOWER}*{_ENDING}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


class TokenType(IntEnum):
    """What a token is, in the numbers of GGUF's `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def spell_bytes() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary: itself where it can be seen."""
    seen = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in seen else next(others)) for byte in range(256)]


def tokenizer_json(tokens: Sequence[str], merges: Sequence[str], types: Sequence[int]) -> str:
    """Give the text of a tokenizer.json.

    `tokens`: by id, spelled as `spell_bytes` says, or as they stand for control tokens and those that users defined.
    `merges`: pairs with a space between them, the first to be merged in front. `types`: a `TokenType` for each token.
    All three are as GGUF has them under `tokenizer.ggml`.
    """
    added = [
        {"id": number, "content": token, "special": kind == TokenType.CONTROL}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED)
    ]
    bytes_as_they_are = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    words = {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Isolated", "invert": False}
    model: dict[str, Any] = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": True,  # a word that is a token is that token, whatever its bytes would be merged to
        "vocab": {token: number for number, token in enumerate(tokens)},
        "merges": merges,
    }
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [words, bytes_as_they_are]},
        "post_processor": None,
        "decoder": bytes_as_they_are,
        "model": model,
    }
    return json.dumps(content, ensure_ascii=False)
