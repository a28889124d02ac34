"""Meta's `tokenizer.model` as the text of a tokenizer.json, with the control tokens of Llama 4 behind its tokens.

The file says of each token its bytes and its rank, the order in which merges are tried; the merges themselves it does
not say. A token is merged of the two parts that its bytes have come to just before it: no merge across its ends can
have come first, or it would not be made at all.
"""

from __future__ import annotations

import binascii
from base64 import b64decode
from collections.abc import Mapping
from pathlib import Path

from arriero.errors import ArrieroError
from arriero.graphs.sources.tokenizer_json import TokenType, spell_bytes, tokenizer_json

RESERVED = 2048  # ids for control tokens, behind those of the file
REMEDY = "Download the tokenizer.model that Meta publishes with Llama 4"

# The control tokens in the order of their ids, by group. `0-5` are those of the group that have no use yet.
_GROUPS = {
    "": "begin_of_text end_of_text fim_prefix fim_middle fim_suffix",
    "text_post_train_": "header_start header_end eom eot step 0-5 python_start python_end finetune_right_pad 8-68",
    "vision_": "image_start image_end 0-1 tile_x_separator tile_y_separator 2-5 image 6-6 patch 7-1047",
    "reasoning_": "0-7 reasoning_thinking_start reasoning_thinking_end",
}


def control_tokens() -> list[str]:
    """Llama 4's control tokens in the order of their ids, those without a use included."""
    names = [name for group, listed in _GROUPS.items() for entry in listed.split() for name in _names(group, entry)]
    return [f"<|{name}|>" for name in [*names, *_names("", f"0-{RESERVED - len(names) - 1}")]]


def _names(group: str, entry: str) -> list[str]:
    first, _, last = entry.partition("-")
    return [f"{group}reserved_special_token_{n}" for n in range(int(first), int(last) + 1)] if last else [entry]


def read_meta_tokenizer(path: Path) -> str:
    """Give the text of the tokenizer.json that a `tokenizer.model` stands for. Raises ArrieroError for another file."""
    ranks = _read_ranks(path)
    letters = spell_bytes()

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    pairs = (_last_pair(token, ranks) for token in ranks)
    merges = [f"{spelled(left)} {spelled(right)}" for left, right in filter(None, pairs)]
    control = control_tokens()
    types = [TokenType.NORMAL] * len(ranks) + [TokenType.CONTROL] * len(control)
    return tokenizer_json([*map(spelled, ranks), *control], merges, types)


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Each token's rank, in the order of the ranks: all numbers from 0."""
    ranks: dict[bytes, int] = {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ArrieroError(f"cannot be read ({error.strerror})", where=str(path), remedy=REMEDY) from None
    for number, line in enumerate(filter(None, lines)):
        try:
            token, rank = line.split()
            ranks[b64decode(token, validate=True)] = int(rank)
            in_order = int(rank) == number and len(ranks) == number + 1
        except (ValueError, binascii.Error):
            in_order = False
        if not in_order:
            what, expected = f"holds {line[:40]!r}", f"a new token's bytes in base64, and its rank {number}"
            raise ArrieroError(what, where=f"{path}:{number + 1}", expected=expected, remedy=REMEDY)
    if missing := 256 - sum(len(token) == 1 for token in ranks):
        what = f"has no token for {missing} of the 256 bytes"
        raise ArrieroError(what, where=str(path), expected="one for each", remedy=REMEDY)
    return ranks


def _last_pair(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two tokens that `token` is merged of, None for a byte and where no merges lead to it."""
    parts = [token[at : at + 1] for at in range(len(token))]
    while len(parts) > 2:
        best, rank = 0, len(ranks)
        for at in range(len(parts) - 1):
            other = ranks.get(parts[at] + parts[at + 1], rank)
            if other < rank:
                best, rank = at, other
        if rank == len(ranks):
            return None
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None
