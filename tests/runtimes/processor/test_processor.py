import json
import sys

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models

from arriero.errors import ArrieroError, MachineLacks
from arriero.runtimes.backend import ModelSpec
from arriero.runtimes.processor.detokenize import Detokenizer
from arriero.runtimes.processor.processor import Processor, Prompt
from tests.runtimes.conftest import SPECIALS, model_entry, write_tokenizer

START = "<|begin_of_text|><|header_start|>user<|header_end|>"
END = "<|eot|><|header_start|>assistant<|header_end|>"
TILE = "<|patch|>" * 4
ONE = f"<|image_start|><|image|>{TILE}<|image_end|>"
square = Image.new("RGB", (28, 28))


def text_of(processor, prompt):
    return processor.decode(prompt.input_ids, skip_special_tokens=False)


def test_plain_text_becomes_one_user_message(processor):
    prompt = processor.encode("héllo 😀, longer than the five tokens of the saved truncation")
    assert text_of(processor, prompt) == f"{START}héllo 😀, longer than the five tokens of the saved truncation{END}"
    assert prompt.input_ids.dtype == np.int64
    assert prompt.pixel_values is None


def test_messages_go_through_the_template(processor):
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]},
    ]
    system = "<|begin_of_text|><|header_start|>system<|header_end|>be brief<|eot|>"
    expected = f"{system}<|header_start|>user<|header_end|>a{ONE}b{END}"
    assert text_of(processor, processor.encode(messages, [square])) == expected


def test_images_stand_first_unless_the_text_says_where(processor):
    assert text_of(processor, processor.encode("what?", [square, square])) == f"{START}{ONE}{ONE}what?{END}"
    assert text_of(processor, processor.encode("what?", np.asarray(square))) == f"{START}{ONE}what?{END}"
    placed = processor.encode("a<|image|>b", square, special_tokens=True)
    assert text_of(processor, placed) == f"{START}a{ONE}b{END}"


def test_tiles_of_a_large_image_are_laid_out_in_rows(processor):
    shown = [{"role": "user", "content": [{"type": "image"}]}]
    prompt = processor.encode(shown, [Image.new("RGB", (56, 56))])
    row = f"{TILE}<|tile_x_separator|>{TILE}<|tile_y_separator|>"
    assert text_of(processor, prompt) == f"{START}<|image_start|>{row}{row}<|image|>{TILE}<|image_end|>{END}"
    assert prompt.pixel_values.shape == (5, 3, 28, 28)
    wide = processor.encode(shown, [Image.new("RGB", (56, 28))])
    assert text_of(processor, wide) == f"{START}<|image_start|>{row}<|image|>{TILE}<|image_end|>{END}"


def shade(value):
    return np.full((28, 28, 3), value, np.uint8)


def test_images_keep_the_order_of_their_places(processor, tmp_path):
    Image.fromarray(shade(40)).save(tmp_path / "forty.png")
    messages = [
        {"role": "user", "content": "first <|image|>"},
        {"role": "user", "content": [{"type": "image", "path": str(tmp_path / "forty.png")}, {"type": "image"}]},
        {"role": "user", "content": [{"type": "image", "image": shade(200)}, {"type": "text", "text": "<|image|>"}]},
        {"role": "user", "content": [{"type": "video", "frames": [shade(230), shade(240)]}]},
    ]
    prompt = processor.encode(messages, [shade(0), shade(80), shade(220)], special_tokens=True)
    shades = np.round((prompt.pixel_values[:, 0, 0, 0] + 1) * 127.5)
    np.testing.assert_allclose(shades, [0, 40, 80, 200, 220, 230, 240], atol=1)


@pytest.mark.parametrize(
    ("prompt", "images", "sentence"),
    [
        ("a<|image|>", [], "1 image placeholders and 0 images"),
        ("a<|image|>", [square, square], "1 image placeholders and 2 images"),
        ([{"role": "user", "content": [{"type": "image"}]}], [], "1 image placeholders and 0 images"),
        ([{"role": "user", "content": "a"}], [square], "0 image placeholders and 1 images"),
        ("a<|patch|>", [square], "5 <|patch|> tokens and its images make 4"),
        ([{"role": "user"}], [], r"messages\[0\]: a message is malformed"),
        (["a"], [], r"messages\[0\]: a message is malformed"),
        ([{"role": "narrator", "content": "a"}], [], r"messages\[0\].role: there is no role 'narrator'"),
        ([{"role": None, "content": "a"}], [], r"messages\[0\].role: there is no role None"),
        (b"a", [], "the prompt is a bytes"),
        ([{"role": "user", "content": 5}], [], r"messages\[0\]: the content is malformed"),
        ([{"role": "user", "content": [{"type": "audio"}]}], [], r"content\[0\]: the entry of type 'audio'"),
        ([{"role": "user", "content": ["a"]}], [], "the entry of str is unknown"),
        ([{"role": "user", "content": [{"type": "video", "frames": []}]}], [], "the video has no frames"),
        ([{"role": "user", "content": [{"type": "video", "frames": None}]}], [], "the entry of type 'video'"),
        ([{"role": "user", "content": [{"type": "video", "path": None}]}], [], "the entry of type 'video'"),
        ("a\udcff", [], "no character; expected text that can be written as UTF-8"),
        ("a", 5, "5: this is not a readable image"),
    ],
)
def test_wrong_prompts_are_refused(processor, prompt, images, sentence):
    with pytest.raises(ArrieroError, match=sentence.replace("|patch|", r"\|patch\|")):
        processor.encode(prompt, images, special_tokens=True)


@pytest.mark.parametrize(
    ("ids", "tiles", "sentence"),
    [
        ("abc", None, r"Prompt.input_ids: the ids are <U3 \[\]; expected a flat list of whole numbers"),
        ([[1, 2]], None, r"the ids are int64 \[1, 2\]"),
        ([1.5], None, "the ids are float64"),
        ([True], None, "the ids are bool"),
        (None, None, "the ids are object"),
        ([1], "picture", r"Prompt.pixel_values: the tiles are <U7 \[\]"),
        ([1], np.zeros((1, 3, 4, 4), np.uint8), "the tiles are uint8"),
        ([1], np.zeros((3, 4, 4), np.float32), r"the tiles are float32 \[3, 4, 4\]"),
    ],
)
def test_a_prompt_of_wrong_types_is_refused_where_it_is_made(ids, tiles, sentence):
    with pytest.raises(ArrieroError, match=sentence):
        Prompt(ids, tiles)


def test_ids_of_wrong_types_are_not_decoded(processor):
    assert processor.decode([97, np.int64(98)]) == processor.decode(np.array([97, 98]))
    for ids in (["a"], "ab", [1.5], [None], [-1], [True], 5.0, [10**30]):
        with pytest.raises(ArrieroError, match="is no token id"):
            processor.decode(ids)


def test_a_missing_video_library_is_named(processor, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MachineLacks, match=r"needs the package av.*arriero\[video\]"):
        processor.encode([{"role": "user", "content": [{"type": "video", "path": "x.mp4"}]}])


def test_a_text_only_model_refuses_images_and_needs_no_image_settings(tmp_path):
    write_tokenizer(tmp_path / "t")
    (tmp_path / "t" / "preprocessor_config.json").unlink()
    processor = Processor(tmp_path / "t", ModelSpec.parse(model_entry(vision=None)))
    assert text_of(processor, processor.encode("a")) == f"{START}a{END}"
    with pytest.raises(ArrieroError, match=r"no vision tower.*modalities"):
        processor.encode("a", [square])


def test_without_a_template_plain_text_only(tmp_path):
    write_tokenizer(tmp_path / "t")
    (tmp_path / "t" / "chat_template.jinja").unlink()
    spec = ModelSpec.parse(model_entry())
    processor = Processor(tmp_path / "t", spec)
    assert text_of(processor, processor.encode("a", [square])) == f"<|begin_of_text|>{ONE}a"
    with pytest.raises(ArrieroError, match="no chat template"):
        processor.encode([{"role": "user", "content": "a"}])
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "{{ messages[0].content }}!"}]
    for template in ("{{ messages[0].content }}!", named):
        (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        assert text_of(Processor(tmp_path / "t", spec), Processor(tmp_path / "t", spec).encode("a")) == "a!"


def test_settings_may_stand_in_the_processor_config(tmp_path):
    write_tokenizer(tmp_path / "t")
    (tmp_path / "t" / "preprocessor_config.json").rename(tmp_path / "t" / "old")
    settings = {"image_processor": {"size": {"height": 28, "width": 28}, "max_patches": 1}, "patch_size": 7}
    (tmp_path / "t" / "processor_config.json").write_text(json.dumps(settings))
    processor = Processor(tmp_path / "t", ModelSpec.parse(model_entry()))
    assert len(processor.encode("a", [Image.new("RGB", (56, 56))]).pixel_values) == 1


def test_streamed_text_never_has_half_a_character(processor):
    text = "añ😀 漢字 \u200d👩\u200d🚀 \ufffd end"
    stream = processor.detokenizer()
    pieces = [stream.push(int(token)) for token in processor.tokenize(text)]
    assert "".join(pieces) + stream.flush() == text
    whole = [piece for piece in pieces if piece]
    assert all(piece in text for piece in whole)
    assert max(len(piece) for piece in whole if "\ufffd" not in piece) == 1  # nothing waits without need


def test_an_unfinished_character_shows_at_the_end_only(processor):
    stream = processor.detokenizer()
    ids = processor.tokenize("a😀")[:-1]
    assert [stream.push(int(token)) for token in ids] == ["a", "", "", ""]
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_special_tokens_are_left_out_of_the_stream(processor):
    stream = processor.detokenizer()
    ids = processor.tokenize("a<|eot|>b", special_tokens=True)
    assert [stream.push(int(token)) for token in ids] == ["a", "", "b"]
    assert len(SPECIALS) == 10


def test_streaming_keeps_the_spaces_of_a_word_tokenizer():
    words = {"▁to": 0, "▁be": 1, "▁or": 2, "<unk>": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    stream = Detokenizer(lambda ids: tokenizer.decode(list(ids)))
    assert [stream.push(token) for token in (0, 1, 2, 0, 1)] == ["to", " be", " or", " to", " be"]
