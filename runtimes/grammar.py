"""Which tokens may follow so that an answer keeps to a form: a JSON schema, a regular expression, choices, a grammar.

Needs the package llguidance. V vocabulary.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from arriero.errors import ArrieroError, MachineLacks
from arriero.runtimes.broken_package import importing
from arriero.runtimes.forced_calls import ForcedCalls
from arriero.runtimes.json_schema import MOST_PATTERN, MOST_TEXT, OPTIONS, check_size, check_text, enforceable
from arriero.runtimes.python_calls import python_grammar
from arriero.runtimes.repetitions import check_grammar, check_regex, inline_schemas
from arriero.strict_json import check_characters, parse_json
from arriero.traits import install

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MOST_CHOICES = 1000
MOST_GRAMMAR = 1 << 14  # characters: a terminal of as many optional letters takes llguidance two seconds


@dataclass(frozen=True)
class Form:
    """What an answer must be, one of these or nothing.

    - `json_schema`: JSON that a schema (a mapping, or its text) describes.
    - `regex`: text that a regular expression describes whole.
    - `choice`: one of some texts.
    - `grammar`: text that a grammar in Lark's notation describes.
    - `calls`: calls of functions, in the dialect of the bundle's chat template.

    Each has a size from which on compiling it would take too long, and is refused.
    """

    json_schema: Mapping[str, Any] | str | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    calls: ForcedCalls | None = None

    def __post_init__(self) -> None:
        named = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        if len(named) > 1:
            raise ArrieroError(f"{' and '.join(named)} each say what the answer must be", expected="one of them")
        for name in ("regex", "grammar"):
            if not isinstance(getattr(self, name) or "", str):
                raise ArrieroError(f"{name} is {getattr(self, name)!r:.60}", expected="a text")
            check_characters(getattr(self, name) or "", name)
        if self.json_schema is not None and not isinstance(self.json_schema, Mapping | str):
            raise ArrieroError(f"json_schema is {self.json_schema!r:.60}", expected="a mapping, or its JSON text")
        choice: Any = self.choice
        texts = choice if isinstance(choice, list | tuple) else ()
        if choice is not None and not (texts and all(isinstance(text, str) and text for text in texts)):
            raise ArrieroError(f"choice is {choice!r:.60}", expected="a list of texts")
        if len(texts) > MOST_CHOICES:
            raise ArrieroError(f"choice has {len(texts):,} texts", expected=f"at most {MOST_CHOICES:,}")
        if self.calls is not None and not isinstance(self.calls, ForcedCalls):
            raise ArrieroError(f"calls is {self.calls!r:.60}", expected="a `ForcedCalls`")
        check_text("choice", "".join(texts), MOST_TEXT)
        check_text("regex", self.regex or "", MOST_PATTERN)
        check_text("grammar", self.grammar or "", MOST_GRAMMAR)
        check_regex("regex", self.regex or "")
        check_grammar("grammar", self.grammar or "")
        for schema in inline_schemas(self.grammar or ""):
            check_size(schema)

    @property
    def is_free(self) -> bool:
        """Whether the answer may be anything."""
        return all(getattr(self, field.name) is None for field in fields(self))

    def source(self, matcher: type[LLMatcher], calls_in_python: bool) -> str:
        """The form as llguidance takes it, calls in Python's dialect or in JSON's."""
        json_schema = self.json_schema
        if self.calls is not None:
            json_schema = self.calls.schema
            check_size(json_schema)  # in both dialects
            if calls_in_python and (grammar := python_grammar(self.calls)) is not None:
                return matcher.grammar_from_lark(grammar)
        if json_schema is not None:
            schema, remedy = json_schema, "Write it as one JSON object"
            if isinstance(schema, str):
                schema = parse_json(schema, "json_schema", remedy)
            if not isinstance(schema, Mapping):
                raise ArrieroError(f"json_schema is {schema!r:.60}", expected="a JSON object", remedy=remedy)
            try:
                return matcher.grammar_from_json_schema(enforceable(schema), overrides=OPTIONS)
            except (ValueError, TypeError) as error:
                raise ArrieroError(f"json_schema is no JSON object ({error})", remedy=remedy) from None
        if self.choice is not None:
            return matcher.grammar_from_lark("start: " + " | ".join(json.dumps(text) for text in self.choice))
        if self.regex is not None:
            return matcher.grammar_from_regex(self.regex)
        assert self.grammar is not None
        return matcher.grammar_from_lark(self.grammar)


class Grammars:
    """Turns forms into constraints over one vocabulary; made once, since it reads the whole vocabulary."""

    def __init__(
        self,
        tokenizer: Path,
        vocabulary: int,
        closing: Sequence[int],
        calls_in_python: Callable[[], bool] = lambda: False,
    ) -> None:
        """Read the file `tokenizer` at the first form; `closing` tokens end an answer whose form is complete.

        `calls_in_python` says in which dialect forced calls are written.
        """
        self._calls_in_python = calls_in_python
        self._file, self._vocabulary, self._closing = tokenizer, vocabulary, list(closing)
        self._tokenizer: LLTokenizer | None = None
        self._lock = threading.Lock()
        self._latest: tuple[str, LLMatcher] | None = None  # one request's answers have one form

    def prepare(self) -> None:
        """Read the vocabulary now, where llguidance is installed and can.

        Of 200,000 tokens that takes two seconds, in which no other thread runs Python; compiling forms stops none.
        """
        with suppress(Exception):  # what is wrong is said to whoever asks for a form
            self._read_vocabulary()

    def constrain(self, form: Form) -> Constraint:
        """What keeps one answer to `form`. Raises ArrieroError with the reason where it cannot be enforced.

        The form is compiled, and what may come first computed, on the calling thread.
        """
        tokenizer = self._read_vocabulary()
        from llguidance import LLMatcher

        source = form.source(LLMatcher, form.calls is not None and self._calls_in_python())
        latest = self._latest
        if latest is None or latest[0] != source:
            wrong, problems = LLMatcher.validate_grammar_with_warnings(source, tokenizer)
            if wrong:
                raise _not_enforceable(form, problems[0])
            matcher = LLMatcher(tokenizer, source, log_level=0)
            matcher.compute_bitmask()  # kept by the copies: their first step does not wait for it
            if matcher.is_error():
                raise _not_enforceable(form, matcher.get_error().partition("<state>")[0])
            latest = self._latest = source, matcher
        return Constraint(latest[1].deep_copy(), self._vocabulary)

    def _read_vocabulary(self) -> LLTokenizer:
        remedy = f"Install it with `{install('structured')}`"
        with importing("llguidance", absent=MachineLacks("the package llguidance is not installed", remedy=remedy)):
            from llguidance import LLTokenizer
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = LLTokenizer(str(self._file), n_vocab=self._vocabulary, eos_token=self._closing)
            return self._tokenizer


def _not_enforceable(form: Form, reason: str) -> ArrieroError:
    name = next(field.name for field in fields(form) if getattr(form, field.name) is not None)
    return ArrieroError(f"{name} cannot be enforced: {' '.join(reason.split())}", remedy="Change it, or ask without it")


class Constraint:
    """Where one answer stands in its form."""

    def __init__(self, matcher: LLMatcher, vocabulary: int) -> None:
        """Begin where `matcher` does."""
        self._matcher, self._vocabulary = matcher, vocabulary

    def forbidden(self) -> NDArray[np.bool_]:
        """Which tokens [V] may not follow. Raises ArrieroError where the form asks for too much work."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return np.unpackbits(bits, count=self._vocabulary, bitorder="little") == 0

    def take(self, token: int) -> None:
        """Go on with `token`, which follows."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = " ".join(self._matcher.get_error().split())
            raise ArrieroError(
                f"the answer's form cannot be followed further: {reason}", remedy="Ask for a simpler one"
            )
