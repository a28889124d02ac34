"""Meta's tokenizer.model read without Meta's code: the same ids for every kind of text, and broken files refused."""

import base64
import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from arriero.errors import ArrieroError
from arriero.graphs.sources.meta_tokenizer import control_tokens, read_meta_tokenizer
from arriero.graphs.sources.tokenizer_json import TokenType, tokenizer_json

CORPUS = {
    "english": "It's the dogs' day, isn't it? We'LL see; I'D say THEY'RE 'S 'ſ O'Neill's",
    "languages": "¿Qué tal? Ñandú. Привет, мир! 你好世界。こんにちは 안녕하세요 مرحبا بالعالم שלום नमस्ते",
    "more_languages": "ไทย ქართული ελληνικά Ǆ ǅ ǆ",
    "code": "def f(a: list[int]) -> None:\n\tif a != []:\n\t\treturn a[0]<<3 | 0xFF  # no\r\n\r\n}\n//\n/* x */ <?",
    "numbers": "1 12 123 1234 12345678 3.14159 1e-9 1,000,000 ½ ² ٣٤٥ Ⅻ ①②③ 2026-11-26",
    "spaces": " a  b   c \t d\u00a0e\u2003f\u2028g\u0085h\x0bi\x0cj  \n \n\n \r\n\t\n x  ",
    "emoji": "😀👩‍🚀🏳️‍🌈🇵🇪❤️ ☎ 👍🏽👍🏽",
    "marks": "e\u0301 a\u0308\u0323 \u0301\u0301 \u200d\u200d \ufeff \x00\x01\x7f \u202e",
    "control_tokens": "<|begin_of_text|><|eot|> <|image|> <|reserved_special_token_0|> <|header_start|>system",
    "long": "a" * 3000 + " " * 3000 + "!" * 3000 + "\n" * 3000 + "é" * 3000,
    "empty": "",
}


@pytest.fixture(scope="module")
def meta():
    pytest.importorskip("llama_models", reason="needs llama-models")
    from llama_models.llama4.tokenizer import Tokenizer as MetaTokenizer

    return MetaTokenizer.get_instance()


@pytest.fixture(scope="module")
def ours(meta):
    import llama_models

    text = read_meta_tokenizer(Path(llama_models.__file__).parent / "llama4" / "tokenizer.model")
    tokenizer = Tokenizer.from_str(text)
    tokenizer.encode_special_tokens = True
    return tokenizer


def assert_same_ids(meta, ours, text):
    expected = meta.encode(text, bos=False, eos=False)
    assert ours.encode(text, add_special_tokens=False).ids == expected, ascii(text)
    assert ours.decode(expected, skip_special_tokens=False) == text


@pytest.mark.parametrize("text", CORPUS.values(), ids=CORPUS.keys())
def test_ids_are_those_of_metas_tokenizer(meta, ours, text):
    assert_same_ids(meta, ours, text)


def test_ids_of_random_texts_are_those_of_metas_tokenizer(meta, ours):
    draw = random.Random(13)
    ends = (0x80, 0x800, 0x10000, 0x110000)
    for _ in range(10_000):
        codes = [draw.randrange(draw.choice(ends)) for _ in range(draw.randrange(1, 60))]
        assert_same_ids(meta, ours, "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000))


def test_ids_beside_every_character_are_those_of_metas_tokenizer(meta, ours):
    """Two libraries of regular expressions may know different characters as letters, digits or spaces."""
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    for start in range(0, len(characters), 4096):
        assert_same_ids(meta, ours, "".join(f"a{c}b {c} 1{c}2" for c in characters[start : start + 4096]))


def test_control_tokens_and_their_ids_are_metas(meta, ours):
    assert {token: 200_000 + number for number, token in enumerate(control_tokens())} == meta.special_tokens
    assert ours.get_vocab_size() == meta.n_words == 202_048
    ours.encode_special_tokens = False
    try:
        text = "a<|eot|>b<|image|><|patch|> <|vision_reserved_special_token_1047|>"
        expected = meta.encode(text, bos=False, eos=False, allowed_special="all")
        assert ours.encode(text, add_special_tokens=False).ids == expected
    finally:
        ours.encode_special_tokens = True


BYTES = [bytes([byte]) for byte in range(256)]


def write_ranks(path, tokens):
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def test_merges_are_the_last_ones_and_a_token_that_none_lead_to_is_a_word(tmp_path):
    path = write_ranks(tmp_path / "tokenizer.model", [*BYTES, b"ab", b"bc", b"abc", b"xyz"])
    content = json.loads(read_meta_tokenizer(path))["model"]
    assert content["merges"] == ["a b", "b c", "ab c"]
    tokenizer = Tokenizer.from_str(read_meta_tokenizer(path))
    assert tokenizer.encode("abc xyz xyza").tokens == ["abc", "Ġ", "x", "y", "z", "Ġ", "x", "y", "z", "a"]
    assert tokenizer.encode("xyz").tokens == ["xyz"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"not base64! 0\n", r"tokenizer.model:1: holds b'not base64! 0'; expected a new token's bytes in base64"),
        (b"YQ== 0\nYQ== 1\n", r"tokenizer.model:2: holds b'YQ== 1'"),
        (b"YQ== 0\nYg== 7\n", r"tokenizer.model:2: holds b'YQ== 7'|tokenizer.model:2: holds b'Yg== 7'"),
        (b"YQ== zero\n", "and its rank 0"),
        (b"YQ== 0\n", "has no token for 255 of the 256 bytes"),
        (b"", "has no token for 256 of the 256 bytes"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, content, sentence):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(ArrieroError, match=sentence):
        read_meta_tokenizer(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ArrieroError, match=r"tokenizer\.model: cannot be read .*Download"):
        read_meta_tokenizer(tmp_path / "tokenizer.model")


def test_lists_of_gguf_make_a_tokenizer_with_every_token_at_its_id():
    tokens = ["<s>", *"Ġabcdefghijklmnopqrstuvwxyz", "ab", "<|eot|>", "gracias"]
    kinds = [TokenType.CONTROL, *[TokenType.NORMAL] * 28, TokenType.CONTROL, TokenType.USER_DEFINED]
    tokenizer = Tokenizer.from_str(tokenizer_json(tokens, ["a b"], kinds))
    assert [tokenizer.token_to_id(token) for token in tokens] == [*range(len(tokens))]
    assert tokenizer.encode("<s>abc gracias<|eot|>").tokens == ["<s>", "ab", "c", "Ġ", "gracias", "<|eot|>"]
    added = tokenizer.get_added_tokens_decoder().values()
    assert {token.content: token.special for token in added} == {
        "<s>": True,
        "<|eot|>": True,
        "gracias": False,
    }
