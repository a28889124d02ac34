"""Every file that a Hugging Face checkpoint carries is read, refused, or named in the plan with the reason."""

import json

import pytest

from arriero.errors import ArrieroError
from arriero.export.build_file.read import load_build
from arriero.export.pipeline.bundle import copy_tokenizer
from arriero.export.pipeline.ignored_files import ignored_files
from arriero.export.pipeline.plan import make_plan
from tests.adapters import save_adapter
from tests.command import write_build
from tests.small import small_scout


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


def test_what_lies_beside_an_adapters_weights_is_named_unless_the_model_has_the_same(tmp_path):
    model, same, other = (tmp_path / name for name in ("model", "same", "other"))
    for folder in (model, same, other):
        (folder / "additional_chat_templates").mkdir(parents=True)
        for name in ("adapter_config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"):
            (folder / name).write_text("{}")
    assert ignored_files(model, [same]) == []
    (other / "chat_template.jinja").write_text("{{ messages }}")
    (other / "generation_config.json").write_text('{"temperature": 0.5}')
    (other / "tokenizer_config.json").write_text("{}")
    (other / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    (sentence,) = ignored_files(model, [same, other])
    names = (
        "tokenizer_config.json, chat_template.jinja, additional_chat_templates/tool_use.jinja, generation_config.json"
    )
    assert sentence.startswith(f"{names} of {other} ignored: an adapter brings weights alone")


@pytest.mark.parametrize("key", ["adapters: [{}]", "runtime_adapters: {{own: {}}}"])
def test_the_plan_says_so_of_every_adapter(tmp_path, key):
    model = small_scout(tmp_path / "model", vision=False)
    adapter = save_adapter(model, tmp_path / "adapter")
    (adapter / "chat_template.jinja").write_text("another")
    file = write_build(tmp_path / "build.yaml", model, "text")
    file.write_text(f"{file.read_text()}{key.format(adapter)}\n")
    (sentence,) = [one for one in make_plan(load_build(file)).warnings if "ignored" in one]
    assert sentence.startswith(f"chat_template.jinja of {adapter} ignored")


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
