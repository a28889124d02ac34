"""Every file that a Hugging Face checkpoint carries is read, refused, or named in the plan with the reason."""

import json

import pytest

from arriero.errors import ArrieroError
from arriero.export.pipeline.bundle import copy_tokenizer
from arriero.export.pipeline.ignored_files import ignored_files


def test_what_is_not_taken_up_is_said_with_its_reason(tmp_path):
    assert ignored_files(tmp_path) == []
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "temperature": 0.6, "top_p": 0.9}))
    (tmp_path / "video_preprocessor_config.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"clean_up_tokenization_spaces": true}')
    (tmp_path / "modeling_own.py").write_text("")
    (tmp_path / "additional_chat_templates").mkdir()
    for name in ("default", "rag"):
        (tmp_path / "additional_chat_templates" / f"{name}.jinja").write_text("")
    told = ignored_files(tmp_path)
    assert [sentence.split(" ignored: ")[0] for sentence in told] == [
        "video_preprocessor_config.json is",
        "modeling_own.py is",
        "the chat templates rag are",
        "generation_config.json: temperature, top_p",
        "tokenizer_config.json: clean_up_tokenization_spaces",
    ]
    (tmp_path / "generation_config.json").write_text("[" * 100_000)
    with pytest.raises(ArrieroError, match="nested too deeply"):
        ignored_files(tmp_path)


def test_a_bundle_takes_the_default_template_and_the_added_tokens_along(tmp_path):
    model = tmp_path / "model"
    (model / "additional_chat_templates").mkdir(parents=True)
    for name in ("tokenizer.json", "added_tokens.json", "additional_chat_templates/default.jinja"):
        (model / name).write_text("{}")
    copy_tokenizer(model, tmp_path / "tokenizer")
    copied = sorted(
        file.relative_to(tmp_path / "tokenizer").as_posix() for file in (tmp_path / "tokenizer").rglob("*.*")
    )
    assert copied == ["added_tokens.json", "additional_chat_templates/default.jinja", "tokenizer.json"]
