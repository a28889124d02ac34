"""The checkpoint's `config.json` as frozen facts: every value that changes what a Llama 4 computes, or a refusal.

Defaults and types are those of the Llama 4 configuration classes of Hugging Face `transformers` (the format's
definition), so that a `config.json` means the same here as there. A value that the reference cannot honour is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from arriero.errors import ArrieroError, Problems
from arriero.graphs.config_section import REFETCH, Section
from arriero.strict_json import read_json_object

RopeType = Literal["default", "llama3"]
MOST_LAYERS = 10_000


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
    """The text decoder. Sizes in elements; `chunk` and `floor_scale` in tokens.

    `chunk` is `max_positions` where no layer is chunked, as with `attention_chunk_size: null`.
    """

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

    @property
    def layers(self) -> int:
        """Of the decoder and of the tower."""
        return len(self.text.layers) + (0 if self.vision is None else self.vision.layers)

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
        return cls.of(read_json_object(path, REFETCH), folder, str(path))

    @classmethod
    def of(cls, data: Mapping[str, Any], folder: Path, where: str) -> ModelConfig:
        """Parse a `config.json` mapping, with the stop tokens of a `generation_config.json` in `folder`."""
        config = cls.from_dict(data, where)
        generation = folder / "generation_config.json"
        if generation.is_file():
            problems: list[ArrieroError] = []
            section = Section(read_json_object(generation, REFETCH), str(generation), problems, separator=":")
            ids = section.token_ids("eos_token_id", None, config.text.vocab_size)
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
        whole = Section(data, where, problems, separator=":")
        section = whole if text_only else whole.section("text_config", "llama4_text")
        whole.boolean("tie_word_embeddings", False)  # that of the text section decides
        text = _text(section)
        vision, image_token = None, None
        # Without the section, transformers makes up a tower with random weights, which no checkpoint has.
        if not text_only and data.get("vision_config") is not None:
            vision = _vision(whole.section("vision_config", "llama4_vision_model"))
            for key in ("boi_token_index", "eoi_token_index"):
                if whole.token_id(key, 0) is None:
                    whole.refuse(key, "is no token id", "a number")
            key = "image_token_id" if "image_token_id" in data else "image_token_index"
            image_token = whole.token_id(key, 200092, text.vocab_size)
            if image_token is None:
                whole.refuse(key, f"{data.get(key)!r} stands for no image", "the id of <|patch|>")
        bos = (section if "bos_token_id" in section.data else whole).token_id("bos_token_id", 1)
        eos = (section if "eos_token_id" in section.data else whole).token_ids("eos_token_id", 2)
        for each in {id(one): one for one in (whole, section)}.values():
            for key in ("quantization_config", "compression_config"):
                each.refuse_unless_none(key, "Use the bf16 checkpoint, or remove a key that was left over")
        if problems:
            raise Problems("the checkpoint's config.json cannot be honoured", problems)
        return cls(
            text=text,
            vision=vision,
            image_token_id=image_token,
            bos_token_id=bos,
            eos_token_ids=eos,
            text_only=text_only,
        )

    def without_vision(self) -> ModelConfig:
        """The same model for text alone: no vision tower, and no token stands for an image."""
        return replace(self, vision=None, image_token_id=None)

    def taking(self, modalities: Collection[str]) -> ModelConfig:
        """The model as far as `modalities` ("text", "image") need it."""
        return self if "image" in modalities else self.without_vision()


def _text(section: Section) -> TextConfig:
    count = section.positive("num_hidden_layers", 48, MOST_LAYERS)
    heads, kv_heads = section.positive("num_attention_heads", 40), section.positive("num_key_value_heads", 8)
    dense = section.data.get("moe_layers") == []  # then the file may say that there are 0 experts, every 0 layers
    size = section.count if dense else section.positive
    experts, per_token = size("num_local_experts", 16), size("num_experts_per_tok", 1)
    head_dim, positions = section.positive("head_dim", 128), section.positive("max_position_embeddings", 131072)
    chunk = positions if section.is_null("attention_chunk_size") else section.positive("attention_chunk_size", 8192)
    section.must_be("hidden_act", "silu", ("silu",))
    section.must_be("attention_bias", False, (False,))
    section.ignored_in_inference()
    section.token_id("pad_token_id", None)
    if heads % kv_heads:
        section.refuse("num_key_value_heads", f"{kv_heads} does not divide the {heads} query heads", "a divisor")
    if per_token > experts and not dense:
        section.refuse("num_experts_per_tok", f"{per_token} of {experts} experts", "at most num_local_experts")
    if head_dim % 2:
        section.refuse("head_dim", f"{head_dim} is odd", "an even number, which rotary embeddings pair up")
    return TextConfig(
        vocab_size=section.positive("vocab_size", 202048),
        hidden_size=section.positive("hidden_size", 5120),
        expert_ffn=section.positive("intermediate_size", 8192),
        dense_ffn=section.positive("intermediate_size_mlp", 16384),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        experts=experts,
        experts_per_token=per_token,
        layers=_layers(section, count),
        chunk=chunk,
        rope=_rope(section, 500000.0, positions),
        rms_norm_eps=section.real("rms_norm_eps", 1e-5, at_least=0),
        qk_norm=section.boolean("use_qk_norm", True),
        temperature_tuning=_temperature_tuning(section),
        floor_scale=section.positive("floor_scale", 8192),
        attn_scale=section.real("attn_scale", 0.1),
        tied_embeddings=section.boolean("tie_word_embeddings", False),
        max_positions=positions,
    )


def _temperature_tuning(section: Section) -> bool:
    # The first Llama 4 configuration had 4 here where today's has true.
    value = section.data.get("attn_temperature_tuning")
    return True if type(value) is int and value == 4 else section.boolean("attn_temperature_tuning", True)


def _layers(section: Section, count: int) -> tuple[Layer, ...]:
    interval = section.positive("no_rope_layer_interval", 4)
    rope = section.entries("no_rope_layers", int) or [int((i + 1) % interval != 0) for i in range(count)]
    kinds = section.entries("layer_types", str)
    if kinds is None:
        kinds = ["chunked_attention" if r else "full_attention" for r in rope]
    moe = section.entries("moe_layers", int)
    if moe is None:
        step = section.positive("interleave_moe_layer_step", 1)
        moe = list(range(step - 1, count, step))
    else:
        section.count("interleave_moe_layer_step", 1)
    for key, entries in (("no_rope_layers", rope), ("layer_types", kinds)):
        if len(entries) != count:
            section.refuse(key, f"{len(entries)} entries for {count} layers", "an entry per layer")
            return ()
    if set(rope) - {0, 1}:
        section.refuse("no_rope_layers", f"{sorted(set(rope) - {0, 1})}", "1 (rotary) or 0 (none) for each layer")
    if unknown := set(kinds) - {"chunked_attention", "full_attention"}:
        section.refuse("layer_types", f"{sorted(unknown)}", "'chunked_attention' or 'full_attention'")
    if outside := sorted(i for i in moe if not 0 <= i < count):
        section.refuse("moe_layers", f"layers {outside} do not exist", f"indices below {count}")
    chunks = not section.is_null("attention_chunk_size")
    return tuple(Layer(bool(rope[i]), chunks and kinds[i] == "chunked_attention", i in moe) for i in range(count))


def _rope(section: Section, theta: float, positions: int) -> Rope:
    """The rotary embedding of `rope_scaling`, the older key, or else of `rope_parameters`; so transformers reads it."""
    key = "rope_scaling" if section.data.get("rope_scaling") else "rope_parameters"
    values = section.section(key)
    theta = section.number("rope_theta", theta, above=0)
    if "rope_theta" in values.data:
        theta = values.number("rope_theta", theta, above=0)
    for each in (section, values):
        each.must_be("partial_rotary_factor", None, (None, 1))
    kind = values.data.get("rope_type", values.data.get("type", "default"))
    if kind == "default":
        return Rope("default", theta)
    if kind != "llama3":
        values.refuse("rope_type", f"{kind!r} is not supported", "'default' or 'llama3'")
        return Rope("default", theta)
    missing = [each for each in ("factor", "low_freq_factor", "high_freq_factor") if each not in values.data]
    if missing:
        section.refuse(key, f"llama3 scaling without {', '.join(missing)}", "all three values")
        return Rope("default", theta)
    low, high = (values.number(f"{end}_freq_factor", 1.0, above=0) for end in ("low", "high"))
    if high < low:
        values.refuse("high_freq_factor", f"{high} is below low_freq_factor, {low}", f"at least {low}")
    original = values.positive("original_max_position_embeddings", positions)
    return Rope("llama3", theta, values.number("factor", 1.0, above=0), low, high, original)


def _vision(section: Section) -> VisionConfig:
    config = VisionConfig(
        hidden_size=section.positive("hidden_size", 768),
        layers=section.positive("num_hidden_layers", 34, MOST_LAYERS),
        heads=section.positive("num_attention_heads", 16),
        ffn=section.positive("intermediate_size", 5632),
        channels=section.positive("num_channels", 3),
        image_size=section.positive("image_size", 448),
        patch_size=section.positive("patch_size", 14),
        shuffle=section.real("pixel_shuffle_ratio", 0.5),
        adapter_in=section.positive("projector_input_dim", 4096),
        adapter_out=section.positive("projector_output_dim", 4096),
        rope_theta=_rope(section, 10000.0, 1).theta,
    )
    section.must_be("hidden_act", "gelu", ("gelu",))
    section.must_be("vision_output_dim", 7680, (config.adapter_out,))
    section.must_be("vision_feature_select_strategy", "default", ("default", "full"))
    section.must_be("multi_modal_projector_bias", False, (False,))
    section.must_be("num_channels", 3, (3,))
    section.ignored_in_inference()
    if not 0 < config.shuffle <= 1:
        section.refuse("pixel_shuffle_ratio", f"{config.shuffle} is not a share", "above 0 and at most 1")
    elif round(config.hidden_size / config.shuffle**2) != config.ffn:
        section.refuse(
            "intermediate_size",
            f"{config.ffn} is not what pixel shuffle gives the adapter",
            f"hidden_size / pixel_shuffle_ratio^2 = {round(config.hidden_size / config.shuffle**2)}",
        )
    if config.hidden_size % (4 * config.heads):
        section.refuse(
            "num_attention_heads", f"{config.heads} heads for hidden_size {config.hidden_size}", "4n per head"
        )
    if config.adapter_in != config.adapter_out:
        section.refuse("projector_input_dim", f"{config.adapter_in} is not projector_output_dim", "equal widths")
    if config.image_size % config.patch_size:
        section.refuse("patch_size", f"{config.patch_size} does not divide {config.image_size}", "a divisor")
    return config
