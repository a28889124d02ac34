"""The checkpoint's `config.json` as frozen facts: every value that changes what a Llama 4 computes, or a refusal.

Defaults are those of the Llama 4 configuration class of Hugging Face `transformers` (the format's definition), so that
a `config.json` that leaves a key out means the same here as there. A value that the reference cannot honour is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from arriero.errors import ArrieroError, Problems
from arriero.strict_json import read_json_object

RopeType = Literal["default", "llama3"]
REFETCH = "Take the file from the original checkpoint"


@dataclass(frozen=True)
class Rope:
    """Rotary embedding parameters; `llama3` rescales the low frequencies (Llama 3.1's long-context rule)."""

    type: RopeType
    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_context: int = 8192


@dataclass(frozen=True)
class Layer:
    """What one decoder layer is: rotary or NoPE, chunked or global attention, MoE or dense feed-forward."""

    rope: bool
    chunked: bool
    moe: bool


@dataclass(frozen=True)
class TextConfig:
    """The text decoder. Sizes in elements; `chunk` and `floor_scale` in tokens."""

    vocab_size: int
    hidden_size: int
    expert_ffn: int
    dense_ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    experts_per_token: int
    layers: tuple[Layer, ...]
    chunk: int
    rope: Rope
    rms_norm_eps: float
    qk_norm: bool
    temperature_tuning: bool
    floor_scale: int
    attn_scale: float
    tied_embeddings: bool
    max_positions: int

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the MoE layers, ascending."""
        return tuple(index for index, layer in enumerate(self.layers) if layer.moe)


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower and its adapter. `image_size` and `patch_size` in pixels."""

    hidden_size: int
    layers: int
    heads: int
    ffn: int
    channels: int
    image_size: int
    patch_size: int
    shuffle: float
    adapter_in: int
    adapter_out: int
    rope_theta: float

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens that one tile becomes after pixel shuffle."""
        return int(self.grid * self.shuffle) ** 2


@dataclass(frozen=True)
class ModelConfig:
    """A whole Llama 4: text decoder, optional vision tower, and the token ids that tie them together."""

    text: TextConfig
    vision: VisionConfig | None
    image_token_id: int | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    text_only: bool

    @classmethod
    def load(cls, folder: Path) -> ModelConfig:
        """Read `folder/config.json` (and the stop tokens of `generation_config.json`). Raises `ArrieroError`."""
        path = folder / "config.json"
        if not path.is_file():
            raise ArrieroError(
                "there is no config.json",
                where=str(folder),
                expected="a Hugging Face Llama 4 checkpoint directory",
                remedy="Point `model` at the directory that holds config.json and the safetensors files",
            )
        config = cls.from_dict(read_json_object(path, REFETCH), str(path))
        generation = folder / "generation_config.json"
        if generation.is_file():
            problems: list[ArrieroError] = []
            reader = _Reader(read_json_object(generation, REFETCH), str(generation), problems, separator=":")
            ids = reader.token_ids("eos_token_id", None)
            if problems:
                raise problems[0]
            if ids:
                config = replace(config, eos_token_ids=ids)
        return config

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str) -> ModelConfig:
        """Parse a `config.json` mapping; `where` names it in errors. Raises `Problems` with every refusal at once."""
        model_type = data.get("model_type")
        if model_type not in ("llama4", "llama4_text"):
            raise ArrieroError(
                f"model_type is {model_type!r}",
                where=f"{where}:model_type",
                expected="'llama4' or 'llama4_text'",
                remedy="Arriero exports Llama 4 checkpoints only; no other architecture is approximated",
            )
        text_only = model_type == "llama4_text"
        problems: list[ArrieroError] = []
        whole = _Reader(data, where, problems, separator=":")
        section = whole if text_only else whole.section("text_config")
        raw = section.data
        text = section.text(tied=bool(data.get("tie_word_embeddings", raw.get("tie_word_embeddings", False))))
        vision, image_token = None, None
        if not text_only and data.get("vision_config") is not None:
            vision = whole.section("vision_config").vision()
            key = "image_token_index" if "image_token_index" in data else "image_token_id"
            image_token = whole.token_ids(key, 200092)[0]
        bos = (section if "bos_token_id" in raw else whole).token_ids("bos_token_id", 1)
        eos = (section if "eos_token_id" in raw else whole).token_ids("eos_token_id", 2)
        if problems:
            raise Problems("the checkpoint's config.json cannot be honoured", problems)
        return cls(
            text=text,
            vision=vision,
            image_token_id=image_token,
            bos_token_id=bos[0] if bos else None,
            eos_token_ids=eos,
            text_only=text_only,
        )

    def without_vision(self) -> ModelConfig:
        """The same model for text alone: no vision tower, and no token stands for an image."""
        return replace(self, vision=None, image_token_id=None)


class _Reader:
    """Reads one section of config.json, collecting what is wrong instead of stopping at the first."""

    def __init__(self, data: Mapping[str, Any], where: str, problems: list[ArrieroError], separator: str = ".") -> None:
        self.data, self.where, self.problems, self.separator = data, where, problems, separator

    def refuse(self, key: str, what: str, expected: str) -> None:
        where = f"{self.where}{self.separator}{key}"
        self.problems.append(ArrieroError(what, where=where, expected=expected, remedy=REFETCH))

    def section(self, key: str) -> _Reader:
        return _Reader(self.mapping(key), f"{self.where}{self.separator}{key}", self.problems)

    def mapping(self, key: str) -> Mapping[str, Any]:
        value = self.data.get(key) or {}
        if not isinstance(value, Mapping):
            self.refuse(key, f"{value!r} is not a section", "an object of settings")
            return {}
        return value

    def number(self, key: str, default: float) -> float:
        value = self.data.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            self.refuse(key, f"{value!r} is not a number", "a finite number")
            return default
        return float(value)

    def entries(self, key: str, kind: type[Any]) -> list[Any] | None:
        """The list at `key`, or None when there is none or it is empty."""
        value = self.data.get(key)
        if value is not None and not (isinstance(value, list) and all(isinstance(entry, kind) for entry in value)):
            self.refuse(key, f"{value!r} is not a list of {kind.__name__}", "an entry per layer")
            return None
        return value or None

    def token_ids(self, key: str, default: int | None) -> tuple[int, ...]:
        """One id or several; none where the key is null."""
        value = self.data.get(key, default)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(number) is int and number >= 0 for number in ids):
            self.refuse(key, f"{value!r} is no token id", "a number, or a list of numbers")
            return ()
        return tuple(ids)

    def positive(self, key: str, default: int) -> int:
        value = self.data.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            self.refuse(key, f"{value!r} is not a size", "a positive integer")
            return default
        return value

    def must_be(self, key: str, default: Any, allowed: tuple[Any, ...]) -> None:
        value = self.data.get(key, default)
        if value not in allowed:
            self.refuse(key, f"{value!r} is not something this model class computes", f"one of {allowed}")

    def text(self, tied: bool) -> TextConfig:
        count = self.positive("num_hidden_layers", 48)
        heads = self.positive("num_attention_heads", 40)
        kv_heads = self.positive("num_key_value_heads", 8)
        experts = self.positive("num_local_experts", 16)
        per_token = self.positive("num_experts_per_tok", 1)
        self.must_be("hidden_act", "silu", ("silu",))
        self.must_be("attention_bias", False, (False,))
        if heads % kv_heads:
            self.refuse("num_key_value_heads", f"{kv_heads} does not divide the {heads} query heads", "a divisor")
        if per_token > experts:
            self.refuse("num_experts_per_tok", f"{per_token} of {experts} experts", "at most num_local_experts")
        return TextConfig(
            vocab_size=self.positive("vocab_size", 202048),
            hidden_size=self.positive("hidden_size", 5120),
            expert_ffn=self.positive("intermediate_size", 8192),
            dense_ffn=self.positive("intermediate_size_mlp", 16384),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=self.positive("head_dim", 128),
            experts=experts,
            experts_per_token=per_token,
            layers=self.layers(count),
            chunk=self.positive("attention_chunk_size", 8192),
            rope=self.rope(500000.0),
            rms_norm_eps=self.number("rms_norm_eps", 1e-5),
            qk_norm=bool(self.data.get("use_qk_norm", True)),
            temperature_tuning=bool(self.data.get("attn_temperature_tuning", True)),
            floor_scale=self.positive("floor_scale", 8192),
            attn_scale=self.number("attn_scale", 0.1),
            tied_embeddings=tied,
            max_positions=self.positive("max_position_embeddings", 131072),
        )

    def layers(self, count: int) -> tuple[Layer, ...]:
        interval = self.positive("no_rope_layer_interval", 4)
        step = self.positive("interleave_moe_layer_step", 1)
        rope = self.entries("no_rope_layers", int) or [int((i + 1) % interval != 0) for i in range(count)]
        kinds = self.entries("layer_types", str) or ["chunked_attention" if r else "full_attention" for r in rope]
        listed = self.entries("moe_layers", int)
        moe = set(range(step - 1, count, step) if self.data.get("moe_layers") is None else listed or ())
        if len(rope) < count or len(kinds) < count:
            self.refuse("no_rope_layers", f"{len(rope)} entries for {count} layers", "an entry per layer")
            return ()
        if unknown := set(kinds) - {"chunked_attention", "full_attention"}:
            self.refuse("layer_types", f"{sorted(unknown)}", "'chunked_attention' or 'full_attention'")
        if outside := [i for i in moe if not 0 <= i < count]:
            self.refuse("moe_layers", f"layers {outside} do not exist", f"indices below {count}")
        return tuple(Layer(bool(rope[i]), kinds[i] == "chunked_attention", i in moe) for i in range(count))

    def rope(self, theta: float) -> Rope:
        data = {**self.mapping("rope_scaling"), **self.mapping("rope_parameters")}
        scaling = _Reader({"rope_theta": self.data.get("rope_theta", theta), **data}, self.where, self.problems)
        theta = scaling.number("rope_theta", theta)
        kind = data.get("rope_type", data.get("type", "default"))
        if kind == "default":
            return Rope("default", theta)
        if kind != "llama3":
            self.refuse("rope_parameters.rope_type", f"{kind!r} is not supported", "'default' or 'llama3'")
            return Rope("default", theta)
        missing = [
            key
            for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            if key not in data
        ]
        if missing:
            self.refuse("rope_parameters", f"llama3 scaling without {', '.join(missing)}", "all four values")
            return Rope("default", theta)
        return Rope(
            "llama3",
            theta,
            scaling.number("factor", 1.0),
            scaling.number("low_freq_factor", 1.0),
            scaling.number("high_freq_factor", 1.0),
            scaling.positive("original_max_position_embeddings", 8192),
        )

    def vision(self) -> VisionConfig:
        config = VisionConfig(
            hidden_size=self.positive("hidden_size", 768),
            layers=self.positive("num_hidden_layers", 34),
            heads=self.positive("num_attention_heads", 16),
            ffn=self.positive("intermediate_size", 5632),
            channels=self.positive("num_channels", 3),
            image_size=self.positive("image_size", 448),
            patch_size=self.positive("patch_size", 14),
            shuffle=self.number("pixel_shuffle_ratio", 0.5),
            adapter_in=self.positive("projector_input_dim", 4096),
            adapter_out=self.positive("projector_output_dim", 4096),
            rope_theta=self.rope(10000.0).theta,
        )
        self.must_be("hidden_act", "gelu", ("gelu",))
        self.must_be("vision_output_dim", config.adapter_out, (config.adapter_out,))
        if not 0 < config.shuffle <= 1:
            self.refuse("pixel_shuffle_ratio", f"{config.shuffle} is not a share", "above 0 and at most 1")
        elif round(config.hidden_size / config.shuffle**2) != config.ffn:
            self.refuse(
                "intermediate_size",
                f"{config.ffn} is not what pixel shuffle gives the adapter",
                f"hidden_size / pixel_shuffle_ratio^2 = {round(config.hidden_size / config.shuffle**2)}",
            )
        if config.adapter_in != config.adapter_out:
            self.refuse("projector_input_dim", f"{config.adapter_in} is not projector_output_dim", "equal widths")
        if config.image_size % config.patch_size:
            self.refuse("patch_size", f"{config.patch_size} does not divide {config.image_size}", "a divisor")
        return config
