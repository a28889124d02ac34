"""config.json of Scout, Maverick and Llama Guard 4, in each form that transformers saved it in, means one thing."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from arriero.graphs.config import Layer, ModelConfig, Rope
from tests.graphs.test_config import derived, ours
from tests.released import CHANGES, VERSIONS, released, saved

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """transformers warns that Scout's two frequency factors are equal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    yield
    logging.disable(before)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", CHANGES)
def test_every_form_of_a_released_config_is_the_same_model(name, version):
    data = released(name)
    assert ModelConfig.from_dict(saved(data, version), version) == ModelConfig.from_dict(data, name)


@pytest.mark.parametrize("form", ["released", *VERSIONS])
@pytest.mark.parametrize("name", CHANGES)
def test_transformers_reads_the_same_out_of_a_released_config(name, form):
    data = released(name) if form == "released" else saved(released(name), form)
    config = ModelConfig.from_dict(data, name)
    # Today's class refuses the number that the first one had here.
    data["text_config"]["attn_temperature_tuning"] = bool(data["text_config"]["attn_temperature_tuning"])
    theirs = transformers.Llama4Config.from_dict(data)
    expected = derived(theirs)
    if theirs.text_config.attention_chunk_size is None:  # it has no mask for such layers; they see everything
        expected["chunk"] = None
        expected["layers"] = [(rope, False, moe) for rope, _, moe in expected["layers"]]
    assert ours(config) == expected
    stops = theirs.text_config.eos_token_id
    assert config.eos_token_ids == tuple(stops if isinstance(stops, list) else [stops])
    assert config.bos_token_id == theirs.text_config.bos_token_id


@pytest.mark.parametrize("name", list(CHANGES))
def test_the_form_written_down_is_what_transformers_saves(name):
    data = saved(released(name), VERSIONS[-1])
    if transformers.__version__ != VERSIONS[-1]:
        pytest.skip(f"needs transformers {VERSIONS[-1]}")
    assert json.loads(transformers.Llama4Config.from_dict(data).to_json_string(use_diff=True)) == data


def test_what_the_released_models_are():
    scout, maverick, guard = (ModelConfig.from_dict(released(name), name) for name in ("scout", "maverick", "guard"))
    assert scout.text.rope == Rope("llama3", 500000.0, 16.0, 1.0, 1.0, 8192)
    assert scout.text.layers == (*[Layer(True, True, True)] * 3, Layer(False, False, True)) * 12
    assert scout.text.temperature_tuning
    assert scout.eos_token_ids == (200001, 200007, 200008)
    assert maverick.text.rope == Rope("default", 500000.0)
    assert [layer.moe for layer in maverick.text.layers] == [False, True] * 24
    assert guard.text.layers == (Layer(True, False, False),) * 48
    assert guard.vision == maverick.vision == scout.vision
