"""Every setting beside a tokenizer.json is honoured as Hugging Face's tools honour it, or refused by name."""

import json

import pytest

from arriero.errors import ArrieroError
from arriero.runtimes.backend import ModelSpec
from arriero.runtimes.processor.processor import Processor
from tests.runtimes.conftest import IMAGE_SIZE, model_entry, write_tokenizer
from tests.runtimes.processor.test_processor import text_of

SIZE = {"size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}


@pytest.fixture
def folder(tmp_path):
    write_tokenizer(tmp_path / "t")
    return tmp_path / "t"


def opened(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return Processor(folder, ModelSpec.parse(model_entry()))


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"tokenizer_config": {"split_special_tokens": True}}, "tokenizer_config.json:split_special_tokens: is True"),
        ({"tokenizer_config": {"add_eos_token": True}}, "add_eos_token: is True; expected False"),
        ({"tokenizer_config": {"add_prefix_space": True}}, "add_prefix_space: is True"),
        ({"tokenizer_config": {"add_bos_token": "no"}}, "add_bos_token: is 'no'; expected true or false"),
        ({"processor_config": {"patch_token": "<|x|>"}}, r"processor_config.json:patch_token: is '<\|x\|>'"),
        ({"added_tokens": {"<|new|>": 300}}, r"added_tokens.json: the token '<\|new\|>' has id 300.*not there"),
        ({"added_tokens": {"<|eot|>": 300}}, r"the token '<\|eot\|>' has id 300, and in tokenizer.json 257"),
        ({"tokenizer_config": {"added_tokens_decoder": {"9": {"content": "<|eot|>"}}}}, "has id 9, and in tokenizer"),
        ({"preprocessor_config": {**SIZE, "resize_to_max_canvas": "false"}}, "resize_to_max_canvas: is 'false'"),
        ({"preprocessor_config": {**SIZE, "max_patches": 10**9}}, "max_patches: is 1000000000; expected 1 to 1024"),
        ({"preprocessor_config": {**SIZE, "image_mean": [0.5, 0.5]}}, "image_mean: is .*expected 3 numbers"),
        ({"preprocessor_config": {**SIZE, "image_std": [0.5, 0.5, 0]}}, "image_std: is .*3 numbers above 0"),
        ({"preprocessor_config": {**SIZE, "rescale_factor": True}}, "rescale_factor: is True"),
        ({"preprocessor_config": {**SIZE, "do_convert_rgb": False}}, "do_convert_rgb: is False"),
        (
            {"preprocessor_config": {**SIZE, "image_processor_type": "CLIPImageProcessor"}},
            "image_processor_type: is 'C",
        ),
        ({"processor_config": {"image_processor": [1]}}, "the image settings are a list"),
        ({"special_tokens_map": "[" * 100_000}, "special_tokens_map.json: is not valid JSON .it is nested too deeply"),
        ({"tokenizer_config": '{"a": ' + "1" * 5000 + "}"}, "tokenizer_config.json: is not valid JSON .*4300 digits"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused_by_name(folder, files, sentence):
    with pytest.raises(ArrieroError, match=sentence):
        opened(folder, **files)


def test_a_text_without_a_template_begins_with_bos_unless_the_config_says_otherwise(folder):
    (folder / "chat_template.jinja").unlink()
    processor = opened(folder)
    assert text_of(processor, processor.encode("a")) == "<|begin_of_text|>a"
    processor = opened(folder, tokenizer_config={"add_bos_token": False})
    assert text_of(processor, processor.encode("a")) == "a"


def test_special_tokens_of_the_old_map_reach_the_template_where_transformers_reads_it(folder):
    (folder / "chat_template.jinja").write_text("{{ eos_token }}{{ own_token }}{{ add_bos_token }}")
    config = {"eos_token": "<|eot|>", "add_bos_token": True, "extra_special_tokens": {"own_token": "<|patch|>"}}
    old = {"eos_token": {"content": "<|header_end|>", "lstrip": False}}
    processor = opened(folder, tokenizer_config=config, special_tokens_map=old)
    assert text_of(processor, processor.encode("a")) == "<|header_end|><|patch|>"
    newer = {**config, "added_tokens_decoder": {"257": {"content": "<|eot|>", "special": True}}}
    processor = opened(folder, tokenizer_config=newer)
    assert text_of(processor, processor.encode("a")) == "<|eot|><|patch|>"


def test_nested_image_settings_win_as_in_transformers(folder):
    from PIL import Image

    nested = {"image_processor": {**SIZE, "max_patches": 1}}
    processor = opened(folder, processor_config=nested)  # beside a preprocessor_config.json that says 4
    assert len(processor.encode("a", [Image.new("RGB", (56, 56))]).pixel_values) == 1
