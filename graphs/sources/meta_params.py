"""Meta's params.json as frozen facts, key by key with the types of `llama_models.llama4.args.ModelArgs`, or a refusal.

Meta's reader takes a text for the number or the switch that it spells; here it is refused, as in config.json. The keys
that say how wide a layer is are of Meta's training: the tensors' shapes decide. Keys of other names are left aside, as
Meta's reader leaves them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from arriero.errors import ArrieroError, raise_together
from arriero.graphs.config import MOST_LAYERS
from arriero.graphs.config_section import Section

REMEDY = "Download params.json again, beside the files of the same model"
TOWER = ("image_size", "patch_size", "dim", "n_layers", "n_heads", "mlp_ratio", "output_dim", "pixel_shuffle_ratio")
FROM_TOKENIZER = -1  # a vocabulary's size that the file leaves to the tokenizer


@dataclass(frozen=True)
class ScaledRope:
    """How rotary frequencies are stretched."""

    factor: float
    high_freq_factor: float


@dataclass(frozen=True)
class TowerParams:
    """The vision tower. `image_size` and `patch_size` in pixels, of squares."""

    dim: int
    layers: int
    heads: int
    image_size: int
    patch_size: int
    output_dim: int
    shuffle: float


@dataclass(frozen=True)
class MetaParams:
    """What the file says of a model. Sizes in elements, `chunk` and `floor_scale` in tokens; `experts` 0 is dense."""

    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int | None
    norm_eps: float
    chunk: int | None
    rope_theta: float
    scaled_rope: ScaledRope | None
    nope_interval: int | None
    qk_norm: bool
    temperature_tuning: bool
    floor_scale: int
    attn_scale: float
    experts: int
    experts_per_token: int
    moe_step: int
    tower: TowerParams | None

    @classmethod
    def read(cls, stated: Mapping[str, Any], where: str) -> MetaParams:
        """Read the content of the file `where`. Raises `Problems` with every refusal at once."""
        problems: list[ArrieroError] = []
        section = Section(stated, where, problems, separator=":", remedy=REMEDY)
        if isinstance(stated.get("model"), Mapping):
            section = section.section("model")
        params = _read(section)
        raise_together(problems, "the model's params.json cannot be honoured")
        return params


def _read(section: Section) -> MetaParams:
    _require(section, "dim", "n_layers", "n_heads")
    dim, heads, head_dim = section.positive("dim", 1), section.positive("n_heads", 1), _size(section, "head_dim")
    if head_dim is None and dim % heads:
        section.refuse("n_heads", f"{heads} heads do not divide dim, {dim}", "a divisor")
    floor_scale = section.number("floor_scale", 8192.0, above=0)
    if not floor_scale.is_integer():
        section.refuse("floor_scale", f"{floor_scale} is no number of tokens", "a whole number")
    moe = section.section("moe_args")
    if moe.data:
        _require(moe, "num_experts")
    vocabulary = section.data.get("vocab_size", FROM_TOKENIZER)
    _check_unused(section, moe)
    return MetaParams(
        dim=dim,
        layers=section.positive("n_layers", 1, MOST_LAYERS),
        heads=heads,
        kv_heads=_size(section, "n_kv_heads") or heads,
        head_dim=head_dim or dim // heads,
        vocab_size=None if vocabulary == FROM_TOKENIZER else section.positive("vocab_size", 1),
        norm_eps=section.number("norm_eps", 1e-5),
        chunk=_size(section, "attention_chunk_size"),
        rope_theta=section.number("rope_theta", 500000.0, above=0),
        scaled_rope=_scaled_rope(section),
        nope_interval=_size(section, "nope_layer_interval"),
        qk_norm=section.boolean("use_qk_norm", False),
        temperature_tuning=section.boolean("attn_temperature_tuning", False),
        floor_scale=int(floor_scale),
        attn_scale=section.number("attn_scale", 0.1),
        experts=moe.positive("num_experts", 1) if moe.data else 0,
        experts_per_token=moe.positive("top_k", 1),
        moe_step=moe.positive("interleave_moe_layer_step", 1),
        tower=_tower(section.section("vision_args")) if section.data.get("vision_args") is not None else None,
    )


def _scaled_rope(section: Section) -> ScaledRope | None:
    scaled = ScaledRope(
        _number(section, "rope_scaling_factor", above=0) or 16.0,
        _number(section, "rope_high_freq_factor", above=0) or 1.0,
    )
    return scaled if section.boolean("use_scaled_rope", False) else None


def _tower(section: Section) -> TowerParams:
    _require(section, *TOWER)
    section.number("mlp_ratio", 4.0, above=0)  # the shapes decide
    return TowerParams(
        dim=section.positive("dim", 1),
        layers=section.positive("n_layers", 1, MOST_LAYERS),
        heads=section.positive("n_heads", 1),
        image_size=_side(section, "image_size"),
        patch_size=_side(section, "patch_size"),
        output_dim=section.positive("output_dim", 1),
        shuffle=section.number("pixel_shuffle_ratio", 0.5, above=0),
    )


def _side(section: Section, key: str) -> int:
    """The side of a square, of its height and width."""
    size = section.section(key)
    _require(size, "height", "width")
    height, width = size.positive("height", 1), size.positive("width", 1)
    if height != width:
        section.refuse(key, f"{height} by {width} pixels are no square", "equal height and width")
    return height


def _check_unused(section: Section, moe: Section) -> None:
    """Refuse what says that the weights are of another kind, and wrong types of what the shapes decide."""
    _size(section, "multiple_of")
    for inner, key in ((section, "ffn_dim_multiplier"), (section, "ffn_exp"), (moe, "capacity_factor")):
        _number(inner, key)
    moe.boolean("auto_scale_F", True)
    section.refuse_unless_none("lora_args", "Take the release whose weights are whole, without adapters beside them")
    quantised = section.section("quantization_args")
    for key in quantised.data:
        if quantised.data[key] is not False:
            quantised.refuse_unless_none(key, "Take the bfloat16 release, or one in Hugging Face's layout")


def _require(section: Section, *keys: str) -> None:
    for key in keys:
        if key not in section.data:
            section.refuse(key, "is missing", "a value")


def _size(section: Section, key: str) -> int | None:
    """A size, None where the key is null or missing."""
    return None if section.data.get(key) is None else section.positive(key, 1)


def _number(section: Section, key: str, above: float | None = None) -> float | None:
    """A number, None where the key is null or missing."""
    return None if section.data.get(key) is None else section.number(key, 1.0, above)
