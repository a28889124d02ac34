"""LoRA adapters merged as rows are read, judged by PEFT: its merged weights, and its own forward."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from arriero.errors import ArrieroError
from arriero.export.proof.reference import TorchBackend
from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.sources.adapter_config import READ, TAKEN_OUT, WITHOUT_EFFECT, AdapterConfig
from tests.toys import make_maverick_toy, make_scout_toy

peft = pytest.importorskip("peft", reason="needs the package peft, of the extra `test`")

EXPERTS = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]
LINEAR = r".*(q_proj|k_proj|v_proj|o_proj|shared_expert\.(gate|up|down)_proj)"


def train(source: Path, folder: Path, **settings: Any) -> Any:
    """An adapter with random factors, saved by PEFT; gives the model that wears it."""
    from tests.layouts.split_experts import load

    torch.manual_seed(5)
    config = {"r": 4, "lora_alpha": 6, "target_modules": LINEAR, "target_parameters": EXPERTS, **settings}
    model = peft.get_peft_model(load(source, torch.float32), peft.LoraConfig(init_lora_weights=False, **config))
    for name, values in model.named_parameters():
        if "modules_to_save" in name:
            values.data += 0.05 * torch.randn_like(values)
    model.save_pretrained(folder)
    return model.eval()


SHAPES = {
    "Scout's shape": lambda folder: make_scout_toy(folder, 3, vision=False),
    "Maverick's shape": lambda folder: make_maverick_toy(folder, 4, num_local_experts=8),
    # gate|up is as wide as it is high, so that only PEFT's version says which way round the factors are
    "square experts": lambda folder: make_scout_toy(folder, 3, vision=False, hidden_size=64, intermediate_size=32),
}
KINDS: dict[str, dict[str, Any]] = {
    "everything": {},
    "attention alone": {"target_modules": ["q_proj", "v_proj"], "target_parameters": None},
    "experts alone": {"target_modules": [], "target_parameters": EXPERTS},
    "one stack": {"target_modules": [], "target_parameters": EXPERTS[1:]},
    "rank-stabilised": {"use_rslora": True},
    "a head of its own": {"modules_to_save": ["lm_head"]},
    "ranks by pattern": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"o_proj": 16}},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_merged_weights_and_logits_are_pefts_own(tmp_path: Path, shape: str, kind: str) -> None:
    source = SHAPES[shape](tmp_path / "model")
    wearing = train(source, tmp_path / "adapter", **KINDS[kind])
    checkpoint = Checkpoint.open(source, [tmp_path / "adapter"])
    ids = torch.randint(3, 150, (1, 12), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = wearing(input_ids=ids).logits[0].numpy()
    assert np.abs(logits(checkpoint, ids) - expected).max() < 1e-5 * max(1, np.abs(expected).max())
    assert np.abs(logits(Checkpoint.open(source), ids) - expected).max() > 1e-3, "the adapter does nothing"
    merged = wearing.merge_and_unload().state_dict()
    for name in checkpoint.tensors:
        theirs = merged[name.removeprefix("language_model.")].numpy()
        assert np.abs(checkpoint.read_float32(name) - theirs).max() <= 1e-6 * max(1, np.abs(theirs).max()), name


def logits(checkpoint: Checkpoint, ids: torch.Tensor) -> np.ndarray:
    """The reference's logits [S, V]."""
    backend = TorchBackend(checkpoint)
    count = ids.shape[1]
    embeds = backend.embed(ids.numpy(), np.zeros((0, backend.spec.hidden_size), np.float32))
    cache = backend.new_cache(1, count)
    positions = np.arange(count)[None]
    return backend.forward(embeds, positions, cache, np.arange(count)).logits[0]


def test_factors_of_older_peft_are_told_by_their_shapes(tmp_path: Path) -> None:
    """Before 0.21, A of a stack [E, K, N] held K; the same sum has to come of both."""
    from safetensors.torch import load_file, save_file

    source = make_scout_toy(tmp_path / "model", 3, vision=False, intermediate_size=48)
    train(source, tmp_path / "new", **KINDS["experts alone"])
    (tmp_path / "old").mkdir()
    config = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    (tmp_path / "old" / "adapter_config.json").write_text(json.dumps({**config, "peft_version": "0.18.0"}))
    new, old, experts = load_file(tmp_path / "new" / "adapter_model.safetensors"), {}, 4
    for name in [name for name in new if "lora_A" in name]:
        a, b = new[name], new[name.replace("lora_A", "lora_B")]
        by_expert = b.reshape(b.shape[0], -1, experts).permute(2, 1, 0)  # [E, r, y]
        old[name] = by_expert.reshape(-1, b.shape[0]).contiguous()
        by_rank = a.reshape(experts, -1, a.shape[1]).permute(2, 1, 0)  # [x, r, E]
        old[name.replace("lora_A", "lora_B")] = by_rank.reshape(a.shape[1], -1).contiguous()
    save_file(old, tmp_path / "old" / "adapter_model.safetensors")
    first, second = (Checkpoint.open(source, [tmp_path / name]) for name in ("new", "old"))
    for name in first.tensors:
        np.testing.assert_allclose(first.read_float32(name), second.read_float32(name), atol=1e-6)


def test_several_adapters_are_added_and_each_changes_the_hash(tmp_path: Path) -> None:
    source = make_scout_toy(tmp_path / "model", 3, vision=False)
    for number in (1, 2):
        train(source, tmp_path / f"a{number}", lora_alpha=number)
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    folders = [tmp_path / "a1", tmp_path / "a2"]
    plain, one, both = (Checkpoint.open(source, folders[:count]) for count in range(3))
    values = [checkpoint.read_float32(name) for checkpoint in (plain, one, both)]
    np.testing.assert_allclose(values[2] - values[1], 2 * (values[1] - values[0]), atol=1e-5)
    hashes = {checkpoint.content_hash() for checkpoint in (plain, one, both, Checkpoint.open(source, folders[::-1]))}
    assert len(hashes) == 4


def test_a_tensor_that_only_the_model_itself_has_as_it_is_is_checked_after_a_merged_build(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source, memo = make_scout_toy(tmp_path / "model", 3, vision=False), tmp_path / "hashes.jsonl"
    train(source, tmp_path / "adapter", **KINDS["attention alone"])
    tensors = load_file(source / "model.safetensors")
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    tensors[name.removeprefix("language_model.")][2, 3] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    plain, merged = Checkpoint.open(source), Checkpoint.open(source, [tmp_path / "adapter"])
    merged.content_hash(memo)
    with pytest.raises(ArrieroError, match=rf"{name} .*at \[2, 3\] is NaN or infinite"):
        merged.read(name)
    with pytest.raises(ArrieroError, match=rf"{name} .*at \[2, 3\] is NaN or infinite"):
        plain.content_hash(memo)


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "lm_head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_in_an_adapter_is_refused(tmp_path: Path, part: str, dtype: torch.dtype) -> None:
    from safetensors.torch import load_file, save_file

    source = make_scout_toy(tmp_path / "model", 3, vision=False)
    train(source, tmp_path / "adapter", modules_to_save=["lm_head"], **KINDS["attention alone"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {name: value.to(dtype) for name, value in load_file(file).items()}
    spoiled = next(name for name in tensors if part in name)
    tensors[spoiled][1, 2] = float("nan")
    save_file(tensors, file)
    with pytest.raises(ArrieroError, match=r"in adapter_model.safetensors\): the value at \[1, 2\] is NaN or infinite"):
        Checkpoint.open(source, [tmp_path / "adapter"]).read("language_model.lm_head.weight")


def test_factors_of_integers_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = make_scout_toy(tmp_path / "model", 3, vision=False)
    train(source, tmp_path / "adapter", **KINDS["attention alone"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: value.to(torch.int32) for name, value in load_file(file).items()}, file)
    with pytest.raises(ArrieroError, match=r"is stored as I32 .*expected lora_A and lora_B as matrices of floats"):
        Checkpoint.open(source, [tmp_path / "adapter"])


def test_a_checkpoint_goes_to_another_process_as_what_it_was_opened_from(tmp_path: Path) -> None:
    """Not as the bytes of its files, which are mapped by then."""
    source = make_scout_toy(tmp_path / "source", 1, vision=False)
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        train(source, folder)
    merged = Checkpoint.open(source, [one]).merged([two])
    values = {name: merged.read_float32(name) for name in merged.tensors}
    sent = pickle.dumps(merged)
    assert len(sent) < 1000
    arrived = pickle.loads(sent)
    assert (arrived.model, arrived.adapters) == (source, (one, two))
    assert all(np.array_equal(arrived.read_float32(name), one) for name, one in values.items())


def test_an_adapter_on_a_quantised_model_adds_to_the_values_that_it_has(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="needs the package compressed-tensors, of the extra `test`")
    from tests.layouts.compressed_tensors import write

    source = make_scout_toy(tmp_path / "model", 3, vision=False)
    write(source, tmp_path / "quantised", "w4a16")
    train(source, tmp_path / "adapter")
    base, merged = (
        Checkpoint.open(tmp_path / "quantised"),
        Checkpoint.open(tmp_path / "quantised", [tmp_path / "adapter"]),
    )
    plain, worn = Checkpoint.open(source), Checkpoint.open(source, [tmp_path / "adapter"])
    for name in base.tensors:
        added = worn.read_float32(name) - plain.read_float32(name)
        np.testing.assert_allclose(merged.read_float32(name) - base.read_float32(name), added, atol=1e-5)
    name = "language_model.model.layers.0.feed_forward.experts.down_proj"
    assert merged.tensors[name].form == f"{base.tensors[name].form} with an adapter"
    assert merged.quantised[name] is None  # its codes are no longer its values


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, r"use_dora: is True; expected False: a plain LoRA. Merge it with PEFT"),
    "trained biases": ({"bias": "all"}, r"bias: is 'all'"),
    "another kind": ({"peft_type": "IA3"}, r"type 'IA3'; expected LORA"),
    "a rank that is not theirs": ({"r": 8}, r"of rank 4; expected rank 8"),
    "no rank": ({"r": None}, r"r: None is not a size; expected a positive integer.* Copy the adapter again"),
    "a part of a rank": ({"r": 4.5}, r"r: 4.5 is not a size"),
    "a rank in words": ({"r": "4"}, r"r: '4' is not a size"),
    "no alpha": ({"lora_alpha": 0}, r"lora_alpha: 0 is not a number; expected a finite number above 0"),
    "an alpha in words": ({"lora_alpha": "6"}, r"lora_alpha: '6' is not a number"),
    "a switch in words": ({"use_rslora": "true"}, r"use_rslora: 'true' is neither true nor false"),
    "a switch as a number": ({"use_rslora": 1}, r"use_rslora: 1 is neither true nor false"),
    "part of a rank by pattern": ({"rank_pattern": {"q_proj": 2.5}}, r"rank_pattern.q_proj: 2.5 is not a size"),
    "an alpha by pattern in words": ({"alpha_pattern": {"q_proj": "2"}}, r"alpha_pattern.q_proj: '2' is not a number"),
    "a pattern that is none": ({"alpha_pattern": {"(": 2}}, r"alpha_pattern.\(: is no regular expression"),
    "a list of patterns": ({"rank_pattern": ["q_proj"]}, r"rank_pattern: \['q_proj'\] is not a section"),
    "PiSSA": ({"init_lora_weights": "PiSSA_niter_4"}, r"is 'PiSSA_niter_4', which changes the model's own weights"),
    "a number as a beginning": ({"init_lora_weights": 1}, r"init_lora_weights: is 1; expected true, false or a name"),
    "a version as a number": ({"peft_version": 0.21}, r"peft_version: is 0.21; expected a text"),
    "a switch of later days": ({"use_new_kind": True}, r"use_new_kind: is True; expected a setting that is known"),
    "settings of later days": ({"new_config": {"a": 1}}, r"new_config: is {'a': 1}; .* or remove the key where"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_adapter_that_is_no_plain_lora_is_refused_by_name(tmp_path: Path, case: str) -> None:
    changes, message = REFUSED[case]
    source = make_scout_toy(tmp_path / "model", 3, vision=False)
    train(source, tmp_path / "adapter", **KINDS["attention alone"])
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(ArrieroError, match=message):
        Checkpoint.open(source, [tmp_path / "adapter"])


def test_every_setting_of_peft_is_known(tmp_path: Path) -> None:
    names = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert names <= READ | WITHOUT_EFFECT
    peft.LoraConfig().save_pretrained(tmp_path)
    defaults = AdapterConfig.read(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert dataclasses.replace(AdapterConfig.read(tmp_path), version=defaults.version) == defaults
    settings = {
        "new_config": None,
        "new_switch": False,
        "new_size": 16,
        "new_list": [],
        "init_lora_weights": "gaussian",
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 0.5, **settings}))
    assert AdapterConfig.read(tmp_path).alpha == 0.5


@pytest.mark.parametrize("begun", ["pissa", "olora"])  # the others need data to begin with
def test_peft_itself_changes_the_model_for_adapters_that_began_with_its_weights(tmp_path: Path, begun: str) -> None:
    assert begun in TAKEN_OUT
    source = make_scout_toy(tmp_path / "model", 1, vision=False)
    train(source, tmp_path / "adapter", target_modules=["q_proj"], target_parameters=None)
    from tests.layouts.split_experts import load

    config = peft.LoraConfig.from_pretrained(tmp_path / "adapter")
    config.init_lora_weights = begun
    model = load(source, torch.float32)
    weight = model.model.layers[0].self_attn.q_proj.weight.clone()
    worn = peft.PeftModel.from_pretrained(model, tmp_path / "adapter", config=config)
    own = worn.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    assert (own - weight).abs().max() > 1e-3


def test_an_adapter_of_another_model_names_what_the_model_lacks(tmp_path: Path) -> None:
    source = make_scout_toy(tmp_path / "model", 3, vision=False)
    train(source, tmp_path / "adapter", **KINDS["everything"])
    deeper = make_scout_toy(tmp_path / "shallow", 3, vision=False, num_hidden_layers=2)
    with pytest.raises(ArrieroError, match=r"the model has no language_model.model.layers.[23].*another model"):
        Checkpoint.open(deeper, [tmp_path / "adapter"])
    wider = make_scout_toy(tmp_path / "wide", 3, vision=False, intermediate_size=64)
    with pytest.raises(ArrieroError, match=r"has factors of shapes .* expected those of .*experts"):
        Checkpoint.open(wider, [tmp_path / "adapter"])


def test_an_adapter_in_the_models_place_says_what_it_is(tmp_path: Path) -> None:
    source = make_scout_toy(tmp_path / "model", 3, vision=False)
    train(source, tmp_path / "adapter", **KINDS["attention alone"])
    with pytest.raises(ArrieroError, match=r"is an adapter, not a model; its base is .*Write the base model under"):
        Checkpoint.open(tmp_path / "adapter")
