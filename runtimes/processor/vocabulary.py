"""A checkpoint's tokenizer, which takes control tokens for what they are only where the caller says that they stand.

Control tokens are the special ones, such as `<|eot|>`, and those added tokens that the chat template writes. Elsewhere
their letters are text like any other, as in Meta's own `ChatFormat`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from numbers import Integral
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer

from arriero.errors import ArrieroError
from arriero.runtimes.processor.images import ORIGINAL
from arriero.runtimes.processor.longest_token import longest_token
from arriero.runtimes.processor.own_letters import OwnLetters

CHARACTERS_PER_TOKEN = 16  # more than any ordinary text has
MOST_BYTES = 4  # of a character in UTF-8


class Vocabulary:
    """The tokens of a tokenizer.json: texts to ids and back. Safe to share between threads."""

    def __init__(self, path: Path, template: str = "") -> None:
        """Read `path`; `template` is the source of the chat template."""
        if not path.is_file():
            raise ArrieroError("the tokenizer is missing", where=str(path), remedy=ORIGINAL)
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ArrieroError(f"the tokenizer cannot be read ({error})", where=str(path), remedy=ORIGINAL) from None
        # a saved tokenizer may carry the padding and truncation of its training run, which would cut prompts silently
        tokenizer.no_padding()
        tokenizer.no_truncation()
        added = tokenizer.get_added_tokens_decoder()
        special = {number for number, token in added.items() if token.special}
        written = {
            number
            for number, token in added.items()
            if token.content.strip() and token.content in template and number not in special
        }
        # The library can read special tokens as text, and no others.
        tokenizer.add_special_tokens([AddedToken(added[number].content, special=True) for number in sorted(written)])
        tokenizer.encode_special_tokens = True
        self._where, self._tokenizer, self._skipped = str(path), tokenizer, frozenset(special)
        self.added = {token.content: number for number, token in added.items()}
        self._control = {added[number].content: number for number in special | written}
        longest_first = sorted(self._control, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._control_ids = np.array(sorted(self._control.values()), np.int64)
        self.control_letters = frozenset().union(*self._control)
        self.own_letters = OwnLetters(self._control)
        self.size = tokenizer.get_vocab_size()

    def id(self, token: str) -> int | None:
        """The id of `token`, None if there is none."""
        number: int | None = self._tokenizer.token_to_id(token)
        return number

    def token(self, number: int) -> str | None:
        """The token of id `number`, None if there is none."""
        text: str | None = self._tokenizer.id_to_token(number)
        return text

    def difference(self, other: Vocabulary) -> str | None:
        """The first token that `other` has otherwise, in words; None where both have the same by the same ids."""
        own, others = self._tokenizer.get_vocab(), other._tokenizer.get_vocab()
        if differing := {*own.items()} ^ {*others.items()}:
            token, _ = min(differing, key=lambda entry: entry[1])
            return f"{token!r:.60} has the id {others.get(token)}, and {own.get(token)} here"
        special = sorted(self._skipped ^ other._skipped)
        return f"{self.token(special[0])!r:.60} is special in one of them only" if special else None

    def control_tokens(self, text: str) -> Iterator[re.Match[str]]:
        """Where `text` spells control tokens."""
        return self._pattern.finditer(text)

    def encode(self, text: str, control: str = "", most: int | None = None, boundary: str = "") -> list[int]:
        """The ids of `text`, with the control tokens that `control`, of the same length, spells at the same places.

        No token reaches across a `boundary`, a character that is not encoded itself. Raises ArrieroError for what is no
        text, and for more than `most` tokens before all are made.
        """
        self.refuse_long(text, most, boundary)
        self._refuse_by_beginning(text, control, most, boundary)
        return self._ids(text, control, boundary)

    def _ids(self, text: str, control: str, boundary: str) -> list[int]:
        ids: list[int] = []
        start = 0
        for match in self.control_tokens(control):
            ids += self._words(text[start : match.start()], boundary)
            ids.append(self._control[match.group()])
            start = match.end()
        ids += self._words(text[start:], boundary)
        return ids

    def _words(self, text: str, boundary: str) -> list[int]:
        return [number for part in (text.split(boundary) if boundary else [text]) for number in self._plain(part)]

    @cached_property
    def _longest(self) -> int | None:
        return longest_token(self._tokenizer, self._tokenizer.get_added_tokens_decoder())

    def refuse_long(self, text: str, most: int | None, boundary: str = "") -> None:
        """Refuse a text of more bytes than `most` tokens can stand for, before one is made; see `encode`."""
        if most is None or len(text) <= most or self._longest is None:
            return
        size = len(text) - (text.count(boundary) if boundary else 0)
        room = most * self._longest
        if size <= room < size * MOST_BYTES:
            size = len((text.replace(boundary, "") if boundary else text).encode(errors="surrogatepass"))
        if size > room:
            raise _too_long(text, most)

    def _refuse_by_beginning(self, text: str, control: str, most: int | None, boundary: str) -> None:
        """The same by the tokens of its beginning, in time that grows with `most` and not with the text."""
        size = (most or 0) * CHARACTERS_PER_TOKEN
        while most is not None and size < len(text):
            # the cut may have split one token into all of its letters
            if len(self._ids(text[:size], control[:size], boundary)) > most + (self._longest or CHARACTERS_PER_TOKEN):
                raise _too_long(text, most)
            size *= 2

    def _plain(self, text: str) -> list[int]:
        ids = self._encoded(text) if text else []
        forged = np.intersect1d(np.asarray(ids, np.int64), self._control_ids)
        if len(forged):
            raise ArrieroError(
                f"the tokenizer makes {self.token(int(forged[0]))!r}, a control token, of ordinary text",
                where=self._where,
                remedy="Leave these letters out of the prompt",
            )
        return ids

    def _encoded(self, text: str) -> list[int]:
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        except TypeError:  # of a str, only one that holds half of a surrogate pair
            raise no_character() from None
        return ids

    def decode(self, ids: Sequence[int] | NDArray[np.int64], skip_special_tokens: bool = True) -> str:
        """The text of `ids`. Raises ArrieroError for what are no ids."""
        numbers = list(ids) if np.iterable(ids) else [ids]
        for number in numbers:
            if not isinstance(number, Integral) or isinstance(number, bool) or not 0 <= int(number) < 2**32:
                raise ArrieroError(f"{number!r} is no token id", expected="whole numbers from 0")
        kept = [int(number) for number in numbers if not (skip_special_tokens and int(number) in self._skipped)]
        text: str = self._tokenizer.decode(kept, skip_special_tokens=False)
        return text


def _too_long(text: str, most: int) -> ArrieroError:
    return ArrieroError(
        f"the prompt's {len(text):,} characters are more than {most} tokens, the context",
        expected=f"at most {most} tokens together",
        remedy="Shorten the prompt, or build the bundle with a larger `context`",
    )


def no_character() -> ArrieroError:
    """What is said of half of a surrogate pair."""
    return ArrieroError("the prompt holds what is no character", expected="text that can be written as UTF-8")
