"""Texts of more bytes than the context's tokens stand for are refused before a token is made of them, and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from arriero.errors import ArrieroError
from arriero.models import chasqui
from arriero.runtimes.processor.chat_template import ChatTemplate
from arriero.runtimes.processor.longest_token import longest_token
from arriero.runtimes.processor.processor import Processor
from arriero.runtimes.processor.vocabulary import Vocabulary
from tests.runtimes.conftest import SPECIALS, write_tokenizer

EXAMPLE = Path(chasqui.__file__).parent / "chasqui" / "tokenizer.json"
LONG = "characters are more than 64 tokens, the context; expected at most 64 tokens together"


def byte_level(tmp_path: Path) -> Tokenizer:
    write_tokenizer(tmp_path / "t")
    return Tokenizer.from_file(str(tmp_path / "t" / "tokenizer.json"))


def of(tokenizer: Tokenizer) -> int | None:
    return longest_token(tokenizer, tokenizer.get_added_tokens_decoder())


def test_it_is_the_longest_token_in_bytes(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path)
    assert of(tokenizer) == max(map(len, SPECIALS))
    tokenizer.add_tokens([AddedToken("ñ" * 20)])
    assert of(tokenizer) == 40


def without_a_byte(tokenizer: Tokenizer) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[1:]
    tokenizer.model = models.BPE({letter: n for n, letter in enumerate(letters)}, [])


def with_removed_spaces(tokenizer: Tokenizer) -> None:
    split = pre_tokenizers.Split(Regex(r"\s"), "removed")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])


LOSING: dict[str, Any] = {
    "normalizer": lambda tokenizer: setattr(tokenizer, "normalizer", normalizers.Strip()),
    "removed": with_removed_spaces,
    "no_splitter": lambda tokenizer: setattr(tokenizer, "pre_tokenizer", None),
    "letters": lambda tokenizer: setattr(tokenizer, "pre_tokenizer", pre_tokenizers.Metaspace()),
    "no_byte": without_a_byte,
    "words": lambda tokenizer: setattr(tokenizer, "model", models.WordLevel({"a": 0}, "a")),
    "spaces_beside": lambda tokenizer: tokenizer.add_tokens([AddedToken("<x>", rstrip=True)]),
}


@pytest.mark.parametrize("change", LOSING.values(), ids=LOSING.keys())
def test_there_is_none_where_a_tokenizer_may_let_bytes_go(change: Any, tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path)
    change(tokenizer)
    assert of(tokenizer) is None


def test_no_text_is_refused_that_fits() -> None:
    vocabulary, rng = Vocabulary(EXAMPLE), np.random.default_rng(0)
    longest = vocabulary._longest
    assert longest is not None
    pieces = [*vocabulary.added, "answer", "the ", "ñ", "日本", "\U0001f600", " " * 30, "0", "\n"]
    for _ in range(300):
        text = "".join(rng.choice(pieces, rng.integers(1, 200)))
        for control in ("", text):
            ids = vocabulary.encode(text, control)
            assert len(text.encode()) <= longest * len(ids)
            assert vocabulary.encode(text, control, len(ids)) == ids


def test_a_prompt_of_control_tokens_counts_each_as_one() -> None:
    vocabulary = Vocabulary(EXAMPLE)
    token = max(vocabulary.added, key=len)
    assert vocabulary.encode(token * 64, token * 64, 64) == [vocabulary.added[token]] * 64


def huge(monkeypatch: pytest.MonkeyPatch, processor: Processor) -> list[int]:
    """Let no token be made; gives the lengths of what is rendered."""
    rendered, render = [], ChatTemplate.render

    def counted(self: ChatTemplate, *args: Any, **named: Any) -> str:
        text = render(self, *args, **named)
        rendered.append(len(text))
        return text

    assert processor._vocabulary._longest is not None
    monkeypatch.setattr(ChatTemplate, "render", counted)
    monkeypatch.setattr(processor._vocabulary, "_tokenizer", None)
    monkeypatch.setattr(processor._vocabulary, "own_letters", None)
    return rendered


def test_a_huge_message_is_shown_to_the_template_once_and_to_nothing_else(
    processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered = huge(monkeypatch, processor)
    with pytest.raises(ArrieroError, match=LONG):
        processor.encode("ñ" * 3_000_000, context=64)
    assert len(rendered) == 1
    with pytest.raises(ArrieroError, match=LONG):
        processor.tokenize("x" * 3_000_000, context=64)
    with pytest.raises(ArrieroError, match=LONG):
        processor.tokenize("x" * 3_000_000, special_tokens=True, context=64)
    assert len(rendered) == 1


def test_a_huge_turn_is_refused_and_a_long_conversation_is_not(
    processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = [{"role": "user", "content": "x" * 5000}, {"role": "assistant", "content": "y"}]
    turn = [*said, {"role": "user", "content": "z"}]
    assert len(processor.encode_turn(turn, context=64).input_ids) < 64
    encode = Vocabulary.encode
    monkeypatch.setattr(Vocabulary, "encode", None)
    with pytest.raises(ArrieroError, match=LONG):
        processor.encode_turn([*said, {"role": "user", "content": "z" * 3_000_000}], context=64)
    monkeypatch.setattr(Vocabulary, "encode", encode)


def test_what_a_template_does_not_show_counts_nothing(tmp_path: Path, processor: Processor) -> None:
    write_tokenizer(tmp_path / "t")
    (tmp_path / "t" / "chat_template.jinja").write_text("{{ messages[-1].content | trim }}")
    last = Processor(tmp_path / "t", processor.spec)
    messages = [{"role": "user", "content": text} for text in ("x" * 100_000, f"{' ' * 100_000}a")]
    assert last.encode(messages, context=8).input_ids.size == 1
