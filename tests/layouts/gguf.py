"""GGUF files by llama.cpp's own libraries: `gguf` writes them, ggml's quantiser in C rounds, `gguf` reads them back."""

from __future__ import annotations

import ctypes
import functools
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import xllamacpp
from gguf import GGMLQuantizationType as Type

from tests.layouts.split_experts import load

# What llama.cpp takes for rows whose length 256 does not divide.
SHORT = {Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0, Type.IQ4_XS: Type.IQ4_NL}
KINDS = ("Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "BF16", "F16")


@functools.cache
def quantizer() -> Any:
    """ggml's `ggml_quantize_chunk`, which llama.cpp's tools quantise with."""
    library = ctypes.CDLL(next(str(file) for file in Path(xllamacpp.__file__).parent.glob("xllamacpp*.so")))
    function = library.ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    pointer = ctypes.POINTER(ctypes.c_float)
    function.argtypes = [ctypes.c_int, pointer, ctypes.c_void_p, *[ctypes.c_int64] * 3, pointer]
    return function


def quantized(values: np.ndarray, kind: Type) -> np.ndarray:
    """The bytes [.., K] of `values` f32 [.., K] in a number format, by ggml itself."""
    rows = np.ascontiguousarray(values.reshape(-1, values.shape[-1]), np.float32)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    out = np.zeros((len(rows), rows.shape[1] // block * size), np.uint8)
    weights = np.ones(rows.shape[1], np.float32)  # what an importance matrix says where all inputs matter alike
    pointers = [one.ctypes.data_as(ctypes.POINTER(ctypes.c_float)) for one in (rows, weights)]
    written = quantizer()(int(kind), pointers[0], out.ctypes.data, 0, len(rows), rows.shape[1], pointers[1])
    assert written == out.nbytes
    return out.reshape(*values.shape[:-1], -1)


def write(source: Path, folder: Path, kind: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Convert the checkpoint `source` into files in `folder`; gives every weight as the library reads it back."""
    folder.mkdir(parents=True, exist_ok=True)
    model, config = load(source, dtype), json.loads((source / "config.json").read_text())
    text = config.get("text_config", config)
    writer = gguf.GGUFWriter(folder / f"model-{kind}.gguf", "llama4")
    _add_text_keys(writer, text, source)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA4, text["num_hidden_layers"])
    tower = gguf.GGUFWriter(folder / f"mmproj-{kind}.gguf", "clip") if "vision_config" in config else None
    read_back: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        values = value.float().numpy()
        if name.startswith(("vision_model.", "multi_modal_projector.")):
            assert tower is not None
            tower.add_tensor(_vision_name(name), values)
            read_back[name] = value.float()
            continue
        raw = name.removeprefix("language_model.")
        for part, own in _as_llama_cpp(raw, values):
            mapped = names.get_name(part, try_suffixes=(".weight", ".bias"))
            assert mapped is not None, part
            mapped += "" if mapped.endswith(".weight") else ".weight"
            read_back[f"{name.removesuffix(raw)}{part}"] = torch.from_numpy(_add(writer, mapped, own, kind))
    for file in (writer, tower):
        if file is not None:
            if file is tower:
                _add_vision_keys(file, config["vision_config"])
            file.write_header_to_file()
            file.write_kv_data_to_file()
            file.write_tensors_to_file()
            file.close()
    return read_back


def _as_llama_cpp(name: str, values: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """A tensor as the converter stores it: experts' matrices outputs first, gate and up apart."""
    if name.endswith("experts.gate_up_proj"):
        gate, up = np.split(values.transpose(0, 2, 1), 2, axis=1)
        stem = name.removesuffix("gate_up_proj")
        return [(f"{stem}gate_proj", gate), (f"{stem}up_proj", up)]
    return [(name, values.transpose(0, 2, 1) if name.endswith("experts.down_proj") else values)]


def _add(writer: Any, name: str, values: np.ndarray, kind: str) -> np.ndarray:
    """Add a tensor; vectors and routers stay in float32, as the converter leaves them. Gives what it reads back as."""
    if values.ndim == 1 or "gate_inp" in name:
        writer.add_tensor(name, values)
        return values
    wanted = Type[kind]
    wanted = SHORT.get(wanted, wanted) if values.shape[-1] % 256 else wanted
    plain = kind in ("BF16", "F16")
    data = gguf.quants.quantize(values, wanted) if plain else quantized(values, wanted)
    writer.add_tensor(name, data, raw_dtype=wanted)
    return np.asarray(gguf.quants.dequantize(data, wanted), np.float32).reshape(values.shape)


def _add_text_keys(writer: Any, text: dict[str, Any], source: Path) -> None:
    writer.add_block_count(text["num_hidden_layers"])
    writer.add_context_length(text["max_position_embeddings"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_feed_forward_length(text["intermediate_size_mlp"])
    writer.add_expert_feed_forward_length(text["intermediate_size"])
    writer.add_head_count(text["num_attention_heads"])
    writer.add_head_count_kv(text["num_key_value_heads"])
    writer.add_key_length(text["head_dim"])
    writer.add_value_length(text["head_dim"])
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    writer.add_expert_count(text["num_local_experts"])
    writer.add_expert_used_count(text["num_experts_per_tok"])
    writer.add_interleave_moe_layer_step(text["interleave_moe_layer_step"])
    writer.add_rope_freq_base(text["rope_theta"])
    writer.add_rope_dimension_count(text["head_dim"])
    writer.add_vocab_size(text["vocab_size"])
    writer.add_sliding_window(text["attention_chunk_size"])
    writer.add_uint32("llama4.attention.temperature_length", text["floor_scale"])
    writer.add_float32("llama4.attention.temperature_scale", text["attn_scale"])
    writer.add_bos_token_id(text["bos_token_id"])
    writer.add_eos_token_id(text["eos_token_id"])
    writer.add_pad_token_id(text["pad_token_id"])
    if (source / "tokenizer.json").is_file():
        whole = (source / "tokenizer.json").read_text(encoding="utf-8")
        tokens = dict(json.loads(whole)["model"]["vocab"])
        tokens |= {one["content"]: one["id"] for one in json.loads(whole)["added_tokens"]}
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(sorted(tokens, key=lambda token: tokens[token]))
        writer.add_string("tokenizer.huggingface.json", whole)
    if (source / "chat_template.jinja").is_file():
        writer.add_chat_template((source / "chat_template.jinja").read_text(encoding="utf-8"))


def _add_vision_keys(writer: Any, vision: dict[str, Any]) -> None:
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("llama4")
    writer.add_vision_image_size(vision["image_size"])
    writer.add_vision_patch_size(vision["patch_size"])
    writer.add_vision_embedding_length(vision["hidden_size"])
    writer.add_vision_feed_forward_length(vision["intermediate_size"])
    writer.add_vision_block_count(vision["num_hidden_layers"])
    writer.add_vision_head_count(vision["num_attention_heads"])
    writer.add_vision_attention_layernorm_eps(vision.get("norm_eps", 1e-5))
    writer.add_vision_projector_scale_factor(int(1 / vision["pixel_shuffle_ratio"]))


@functools.cache
def _vision_names() -> Any:
    """The library's table, which takes a fifth of a second to make."""
    return gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 64)


def _vision_name(name: str) -> str:
    """llama.cpp's name, by the library's table and what its converter adds to it."""
    single = {
        "multi_modal_projector.linear_1.weight": f"{gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.V_MMPROJ_FC]}.weight",
        "vision_model.vision_adapter.mlp.fc1.weight": "mm.model.mlp.1.weight",
        "vision_model.vision_adapter.mlp.fc2.weight": "mm.model.mlp.2.weight",
        "vision_model.positional_embedding_vlm": "v.position_embd.weight",
    }
    if name in single:
        return single[name]
    mapped = _vision_names().get_name(name, try_suffixes=(".weight", ".bias"))
    assert mapped is not None, name
    return str(mapped)
