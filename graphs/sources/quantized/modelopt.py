"""NVIDIA Model Optimizer: FP8 with a scale per tensor, NVFP4 with an E4M3 scale per 16 inputs and one for all.

Experts stay stacked: `experts.gate_up_proj` beside `experts.gate_up_proj_weight_scale`. Their nibbles lie in pairs
along the inputs [E, K/2, N], those of a matrix along its rows [N, K/2]. A value is nibble * scale * scale_2, the last
the reciprocal of what compressed-tensors stores. Source: the library's `NVFP4QTensor`. Legend: E experts, N outputs, K
inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from arriero.errors import ArrieroError, raise_together
from arriero.graphs.sources.made_weight import MadeWeight
from arriero.graphs.sources.quantized.codecs import E2M1, Floats, nibbles, spread
from arriero.graphs.sources.quantized.modules import StoredModule, split_modules
from arriero.graphs.sources.stored_codes import StoredCodes
from arriero.graphs.sources.weight_source import WeightSource
from arriero.profiles.float8 import Float8

PARTS = ("weight_scale", "weight_scale_2", "input_scale", "output_scale")
CACHE = (".k_scale", ".v_scale", ".k_bias", ".v_bias")  # of a cache of keys and values, which a target chooses
ALGORITHMS = ("FP8", "NVFP4")
GROUP = 16  # inputs that share a scale in NVFP4


def decode_tensors(
    settings: Mapping[str, Any], tensors: Mapping[str, WeightSource], where: str
) -> dict[str, WeightSource]:
    """Every tensor of the model. Raises `Problems` for algorithms that are not read and parts that do not fit."""
    _check_algorithm(settings, where)
    tensors = {name: source for name, source in tensors.items() if not name.endswith(CACHE)}
    matrices, others = split_modules(
        tensors, {".weight": "weight"} | {f".{part}": part for part in PARTS}, unless=("weight",)
    )
    stacks, decoded = split_modules(
        others,
        {"": "weight"} | {f"_{part}": part for part in PARTS},
        unless=("weight",),
    )
    problems: list[ArrieroError] = []
    for module in (*matrices.values(), *stacks.values()):
        name = module.name if module.name in stacks else f"{module.name}.weight"
        if (source := _decode(module, name)) is not None:
            decoded[source.name] = source
        problems += module.problems
    raise_together(problems, "the checkpoint's quantised tensors are not what its config says")
    return decoded


def _check_algorithm(settings: Mapping[str, Any], where: str) -> None:
    inner = settings.get("quantization")
    stated = (inner if isinstance(inner, Mapping) else settings).get("quant_algo")
    if stated not in ALGORITHMS:
        raise ArrieroError(
            f"quant_algo is {stated!r}",
            where=where,
            expected=" or ".join(ALGORITHMS),
            remedy="Use another release of the model",
        )


def _decode(module: StoredModule, name: str) -> MadeWeight | None:
    weight = module.take("weight", ("F8_E4M3", "U8"))
    if weight is None:
        return None
    if len(weight.shape) not in (2, 3):
        module.refuse("weight", f"has shape {list(weight.shape)}", "a matrix or a stack of experts")
        return None
    return _fp8(module, weight, name) if weight.dtype == "F8_E4M3" else _nvfp4(module, weight, name)


def _fp8(module: StoredModule, weight: WeightSource, name: str) -> MadeWeight | None:
    """E4M3 times a scale, of each expert its own or one for all."""
    stacked = len(weight.shape) == 3
    shapes: list[tuple[int, ...]] = [(), (1,)] + ([weight.shape[:1], (weight.shape[0], 1, 1)] if stacked else [])
    source = module.take("weight_scale", ("F32", "BF16", "F16"), shapes)
    if source is None:
        return None
    scales = source.float32(0, source.shape[0] if source.shape else 1).reshape(-1)

    def own(start: int, stop: int) -> Floats:
        """The scales [n] of rows or experts."""
        return scales[start:stop] if scales.size > 1 else np.broadcast_to(scales, (stop - start,))

    def decode(start: int, stop: int) -> Floats:
        return weight.float32(start, stop) * own(start, stop).reshape(-1, *[1] * (len(weight.shape) - 1))

    def codes(start: int, stop: int) -> Float8:
        bits = weight.rows(start, stop)
        if not stacked:
            return Float8(bits, own(start, stop))
        outputs = weight.shape[2]
        return Float8(bits.transpose(0, 2, 1), np.repeat(own(start, stop)[:, None], outputs, axis=1))

    return MadeWeight(name, weight.shape, "F32", weight.stored, "fp8 tensor", decode, StoredCodes(8, 0, codes))


def _nvfp4(module: StoredModule, weight: WeightSource, name: str) -> MadeWeight | None:
    stacked = len(weight.shape) == 3
    features = 2 * weight.shape[1]
    shape: tuple[int, ...] = (weight.shape[0], features, *weight.shape[2:])
    if features % GROUP:
        module.refuse("weight", f"{features} inputs do not divide into groups of {GROUP}")
        return None
    scales = module.take("weight_scale", ("F8_E4M3",), [(shape[0], features // GROUP, *shape[2:])])
    second = module.take("weight_scale_2", ("F32",), [(), (1,)] + ([(shape[0],), (shape[0], 1, 1)] if stacked else []))
    if scales is None or second is None:
        return None
    whole = second.float32(0, second.shape[0] if second.shape else 1).reshape(-1)

    def decode(start: int, stop: int) -> Floats:
        factors = scales.float32(start, stop) * _of_each(whole, start, stop, len(shape))
        packed = weight.rows(start, stop)
        if not stacked:
            return E2M1[nibbles(packed)] * spread(factors, features)
        values = E2M1[np.stack([packed & 15, packed >> 4], 2).reshape(stop - start, features, shape[2])]
        return values * np.repeat(factors, GROUP, axis=1)

    return MadeWeight(name, shape, "F32", weight.stored, "nvfp4", decode)


def _of_each(whole: Floats, start: int, stop: int, dimensions: int) -> Floats:
    """The scale of each expert, or the one of all."""
    return (whole[start:stop] if whole.size > 1 else whole).reshape(-1, *[1] * (dimensions - 1))
