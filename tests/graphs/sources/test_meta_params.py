"""Meta's params.json: every key of Meta's `ModelArgs` is honoured, or refused by name; judged by that class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from arriero.errors import ArrieroError
from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.names import EMBEDDING
from arriero.graphs.sources.meta_params import MetaParams
from tests.toys import make_scout_toy

SQUARE = {"height": 28, "width": 28}
TOWER: dict[str, Any] = {
    "image_size": SQUARE,
    "patch_size": {"height": 14, "width": 14},
    "dim": 32,
    "n_layers": 2,
    "n_heads": 2,
    "mlp_ratio": 4.0,
    "output_dim": 16,
    "pixel_shuffle_ratio": 0.5,
}
PARAMS: dict[str, Any] = {
    "dim": 64,
    "n_layers": 4,
    "n_heads": 4,
    "n_kv_heads": 2,
    "moe_args": {"num_experts": 16, "top_k": 1},
    "vision_args": TOWER,
}
OF_A_RUN = {"max_batch_size", "max_seq_len"}  # arguments of Meta's own generation


def read(*path: str, value: Any = None) -> MetaParams:
    """What a file says that has `value` at this place."""
    stated = json.loads(json.dumps(PARAMS))
    section = stated
    for key in path[:-1]:
        section = section[key]
    if path:
        section[path[-1]] = value
    return MetaParams.read(stated, "params.json")


def test_every_key_of_metas_reader_is_read_with_its_type() -> None:
    args = pytest.importorskip("llama_models.llama4.args", reason="needs the package llama-models, of the extra `test`")
    sections = {(): args.ModelArgs, ("moe_args",): args.MoEArgs, ("vision_args",): args.VisionArgs}
    args.ModelArgs(**PARAMS)
    for place, fields in sections.items():
        for key in set(fields.model_fields) - OF_A_RUN:
            for value in ("false", [], True if "bool" not in str(fields.model_fields[key].annotation) else 1):
                with pytest.raises(ArrieroError, match=rf"params.json:{'.'.join([*place, key])}\b"):
                    read(*place, key, value=value)


def test_what_the_file_leaves_out_is_what_metas_reader_takes_for_it() -> None:
    args = pytest.importorskip("llama_models.llama4.args", reason="needs the package llama-models, of the extra `test`")
    ours, theirs = read(), args.ModelArgs(**PARAMS)
    assert (ours.rope_theta, ours.norm_eps, ours.attn_scale) == (theirs.rope_theta, theirs.norm_eps, theirs.attn_scale)
    assert (ours.qk_norm, ours.temperature_tuning) == (theirs.use_qk_norm, theirs.attn_temperature_tuning)
    assert (ours.chunk, ours.nope_interval) == (theirs.attention_chunk_size, theirs.nope_layer_interval)
    assert (ours.floor_scale, ours.scaled_rope) == (theirs.floor_scale, None)
    moe = theirs.moe_args
    assert (ours.experts, ours.experts_per_token, ours.moe_step) == (
        moe.num_experts,
        moe.top_k,
        moe.interleave_moe_layer_step,
    )
    scaled = args.ModelArgs(**PARAMS, use_scaled_rope=True)
    factors = read("use_scaled_rope", value=True).scaled_rope
    assert factors is not None
    assert (factors.factor, factors.high_freq_factor) == (scaled.rope_scaling_factor, scaled.rope_high_freq_factor)


REFUSED: list[tuple[tuple[str, ...], Any, str]] = [
    (("use_scaled_rope",), "false", "use_scaled_rope: 'false' is neither true nor false"),
    (("use_qk_norm",), 1, "use_qk_norm: 1 is neither true nor false"),
    (("attn_temperature_tuning",), None, "attn_temperature_tuning: None is neither"),
    (("rope_theta",), "500000", "rope_theta: '500000' is not a number"),
    (("rope_theta",), 0, "rope_theta: 0 is not a number; expected a finite number above 0"),
    (("rope_scaling_factor",), 0, "rope_scaling_factor: 0 is not a number"),
    (("floor_scale",), 8192.5, "floor_scale: 8192.5 is no number of tokens"),
    (("floor_scale",), None, "floor_scale: None is not a number"),
    (("n_layers",), 10**9, "n_layers: 1000000000 is not a size"),
    (("n_heads",), 5, "n_heads: 5 heads do not divide dim, 64"),
    (("n_kv_heads",), 2.0, "n_kv_heads: 2.0 is not a size"),
    (("moe_args", "top_k"), 2.0, "moe_args.top_k: 2.0 is not a size"),
    (("moe_args", "num_experts"), -1, "moe_args.num_experts: -1 is not a size"),
    (("moe_args",), {"top_k": 1}, "moe_args.num_experts: is missing; expected a value. Download params.json again"),
    (("moe_args",), [16], r"moe_args: \[16\] is not a section"),
    (
        ("quantization_args",),
        {"scheme": "int4"},
        "quantization_args.scheme: the weights",
    ),
    (("quantization_args",), {"spinquant": True}, "quantization_args.spinquant: the weights"),
    (("quantization_args",), {"group_size": 32}, "quantization_args.group_size: the weights"),
    (("lora_args",), {"rank": 16, "scale": 2.0}, "lora_args: the weights are stored in a way that is not read"),
    (("vision_args",), {}, "vision_args.image_size: is missing"),
    (("vision_args", "image_size"), {"height": 28, "width": 56}, "image_size: 28 by 56 pixels are no square"),
    (("vision_args", "patch_size"), 14, "vision_args.patch_size: 14 is not a section"),
]


@pytest.mark.parametrize(("path", "value", "message"), REFUSED)
def test_a_value_that_cannot_be_honoured_is_refused_by_name(path: tuple[str, ...], value: Any, message: str) -> None:
    with pytest.raises(ArrieroError, match=message):
        read(*path, value=value)


@pytest.mark.parametrize("key", ["dim", "n_layers", "n_heads"])
def test_a_key_that_metas_reader_needs_is_missing(key: str) -> None:
    with pytest.raises(ArrieroError, match=rf"params.json:{key}: is missing"):
        MetaParams.read({name: value for name, value in PARAMS.items() if name != key}, "params.json")


def test_what_says_nothing_is_taken() -> None:
    for key in (
        "quantization_args",
        "lora_args",
        "rope_scaling_factor",
        "n_kv_heads",
        "ffn_exp",
        "attention_chunk_size",
    ):
        read(key, value=None)
    read("quantization_args", value={"scheme": None, "group_size": None, "spinquant": False})
    read("of_a_later_release", value="anything")  # as Meta's reader takes it
    assert read("moe_args", value=None).experts == 0
    assert read("rope_theta", value=500000).rope_theta == 500000.0
    nested = MetaParams.read({"model": PARAMS}, "params.json")
    assert nested == read()
    with pytest.raises(ArrieroError, match=r"params.json:model.dim: 'x' is not a size"):
        MetaParams.read({"model": {**PARAMS, "dim": "x"}}, "params.json")


def test_sizes_that_the_tensors_do_not_have_are_refused(tmp_path: Path) -> None:
    from tests.layouts import meta

    meta.write(make_scout_toy(tmp_path / "toy", 1), tmp_path / "c", "1", torch.bfloat16)
    file = tmp_path / "c" / "params.json"
    stated = json.loads(file.read_text())
    rows = Checkpoint.open(tmp_path / "c").source(EMBEDDING).shape[0]
    for value in (-1, rows):
        file.write_text(json.dumps({**stated, "vocab_size": value}))
        Checkpoint.open(tmp_path / "c")
    file.write_text(json.dumps({**stated, "vocab_size": rows + 1}))
    with pytest.raises(ArrieroError, match=rf"params.json:vocab_size: is {rows + 1}, and the tensors have {rows}"):
        Checkpoint.open(tmp_path / "c")
    tower = {**stated["vision_args"], "output_dim": 3}
    file.write_text(json.dumps({**stated, "vision_args": tower}))
    with pytest.raises(ArrieroError, match=r"vision_args.output_dim: is 3, and the tensors have"):
        Checkpoint.open(tmp_path / "c")
