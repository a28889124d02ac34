"""compressed-tensors (llm-compressor): FP8, INT8, packed INT4 and INT8, NVFP4, MXFP4 and MXFP8, a matrix at a time.

Source of the formats: the library's compressors. A value is (code - zero point) * scale, in float32; with a global
scale (NVFP4) the scale is first divided by it. Legend: N outputs, K inputs, J groups of inputs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from arriero.errors import ArrieroError, Problems, raise_together
from arriero.graphs.sources.made_weight import MadeWeight
from arriero.graphs.sources.quantized.codecs import E2M1, Floats, e8m0, nibbles, spread
from arriero.graphs.sources.quantized.modules import StoredModule, split_modules
from arriero.graphs.sources.safetensors_header import REDOWNLOAD, to_float32
from arriero.graphs.sources.stored_codes import StoredCodes, block_of
from arriero.graphs.sources.weight_source import WeightSource
from arriero.profiles.float8 import Float8
from arriero.profiles.quantize import Quantized

PARTS = (
    "weight_packed weight_scale weight_zero_point weight_shape weight_g_idx weight_global_scale "
    "input_scale input_zero_point input_global_scale output_scale output_zero_point k_scale v_scale weight"
).split()
ENDINGS = {f".{part}": part for part in PARTS}
SCALES = ("BF16", "F16", "F32")
FORMATS = (
    "float-quantized, int-quantized, naive-quantized, pack-quantized, nvfp4-pack-quantized, mxfp4-pack-quantized, "
    "mxfp8-quantized, or a mixture of them"
)
Decode = Callable[[int, int], Floats]


@dataclass(frozen=True)
class Scheme:
    """How the weights of a group of matrices are stored."""

    targets: tuple[str, ...]
    kind: str  # int or float
    bits: int
    strategy: str
    group: int | None
    block: tuple[int, int] | None

    def takes(self, module: str) -> bool:
        """Whether `module` is meant; the names of classes stand for all of them."""
        return any(_names(target, module) or "." not in target for target in self.targets)


def decode_tensors(
    settings: Mapping[str, Any], tensors: Mapping[str, WeightSource], where: str
) -> dict[str, WeightSource]:
    """Every tensor of the model. Raises `Problems` for schemes that are not read and parts that do not fit."""
    schemes = [*_schemes(settings, where)]
    ignored = [str(entry) for entry in settings.get("ignore") or ()]
    modules, decoded = split_modules(tensors, ENDINGS, unless=("weight",))
    problems: list[ArrieroError] = []
    for module in modules.values():
        if set(module.parts) <= {"k_scale", "v_scale"}:  # of the cache of keys and values, which a target chooses
            continue
        scheme = next((scheme for scheme in schemes if scheme.takes(module.name)), None)
        if any(_names(entry, module.name) for entry in ignored) or scheme is None:
            module.refuse("weight_scale", "is quantised, and quantization_config says that it is not")
        elif (source := _decode(module, scheme)) is not None:
            decoded[source.name] = source
        problems += module.problems
    raise_together(problems, "the checkpoint's quantised tensors are not what its config says")
    return decoded


def _names(entry: str, module: str) -> bool:
    """Whether an entry of `targets` or `ignore` names this module: as it is, or as `re:` and a pattern of its start."""
    pattern = entry.removeprefix("re:")
    return entry == module if pattern == entry else re.match(pattern, module) is not None


def _schemes(settings: Mapping[str, Any], where: str) -> Iterator[Scheme]:
    """What `config_groups` says of weights. Raises Problems for what is not read."""
    groups, problems = settings.get("config_groups"), []
    if not isinstance(groups, Mapping) or not groups:
        raise ArrieroError("holds no config_groups", where=where, expected="a scheme of weights", remedy=REDOWNLOAD)
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            continue  # a group of activations alone
        block = weights.get("block_structure")
        try:
            pattern = None if block is None else tuple(int(side) for side in block)
            scheme = Scheme(
                tuple(map(str, group.get("targets") or ())),
                str(weights.get("type", "int")),
                int(weights.get("num_bits", 8)),
                str(weights.get("strategy") or ("group" if weights.get("group_size") else "tensor")),
                None if weights.get("group_size") is None else int(weights["group_size"]),
                pattern if pattern is None or len(pattern) == 2 else None,
            )
            re.compile("|".join(target.removeprefix("re:") for target in scheme.targets))
        except (TypeError, ValueError, re.error) as error:
            problems.append(ArrieroError(f"is malformed ({error})", where=f"{where}.config_groups.{name}"))
            continue
        if (scheme.kind, scheme.bits) not in {("int", 4), ("int", 8), ("float", 4), ("float", 8)}:
            what = f"stores weights as {scheme.bits}-bit {scheme.kind}"
            problems.append(ArrieroError(what, where=f"{where}.config_groups.{name}", expected=FORMATS))
        yield scheme
    transform = settings.get("transform_config") or {}
    if isinstance(transform, Mapping) and transform.get("config_groups"):
        where_it_stands, expected = f"{where}.transform_config", "no rotations, which belong to every activation too"
        problems.append(ArrieroError("rotates weights", where=where_it_stands, expected=expected))
    sparsity = settings.get("sparsity_config") or {}
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        what = f"stores weights as {sparsity.get('format')!r}"
        problems.append(ArrieroError(what, where=f"{where}.sparsity_config.format", expected="dense"))
    if problems:
        raise Problems("the checkpoint is quantised in a way that is not read", problems)


def _decode(module: StoredModule, scheme: Scheme) -> MadeWeight | None:
    """The matrix of a module; None where its problems say why not."""
    if "weight_packed" in module.parts:
        return _packed(module, scheme) if scheme.kind == "int" else _fp4(module, scheme)
    dtype = "F8_E4M3" if scheme.kind == "float" else "I8"
    weight = module.take("weight", (dtype,))
    if weight is None or not _is_matrix(module, "weight"):
        return None
    rows, features = weight.shape
    scales = _scales(module, scheme, rows, features)
    zeros = module.parts.get("weight_zero_point")
    if scales is None:
        return None
    group = scales(0, 1).shape[-1]

    def decode(start: int, stop: int) -> Floats:
        values = weight.float32(start, stop) if dtype != "I8" else weight.rows(start, stop).astype(np.float32)
        if zeros is not None and zeros.shape:
            values = values - spread(_broadcast(zeros, start, stop), features)
        return values * spread(scales(start, stop), features)

    codes, named = None, f"{'fp8' if scheme.kind == 'float' else 'int8'} {scheme.strategy}"
    if dtype == "F8_E4M3" and group == 1:
        codes = StoredCodes(8, 0, lambda start, stop: Float8(weight.rows(start, stop), scales(start, stop)[:, 0]))
    elif dtype == "I8" and zeros is None and (block := block_of(features // group, features)):
        codes = StoredCodes(
            8,
            block,
            lambda start, stop: Quantized(
                weight.rows(start, stop).view(np.uint8) ^ np.uint8(0x80),
                spread(scales(start, stop), features // block),
                8,
                block,
            ),
            _type_of_scales(module),
        )
    return MadeWeight(f"{module.name}.weight", weight.shape, "F32", weight.stored, named, decode, codes)


def _packed(module: StoredModule, scheme: Scheme) -> MadeWeight | None:
    """Integers of four or eight bits, plus half their range, end to end in 32-bit words along the inputs."""
    packed, bits = module.take("weight_packed", ("I32",)), scheme.bits
    shape = module.take("weight_shape", ("I64", "I32"), [(2,)])
    if packed is None or shape is None or not _is_matrix(module, "weight_packed"):
        return None
    rows, features = (int(size) for size in shape.rows(0, 2))
    if packed.shape != (rows, -(-features * bits // 32)):
        words = [rows, -(-features * bits // 32)]
        module.refuse("weight_packed", f"{module.name}.weight_packed has shape {list(packed.shape)}", str(words))
        return None
    scales = _scales(module, scheme, rows, features)
    if scales is None:
        return None
    groups = scales(0, 1).shape[-1]
    order = module.parts.get("weight_g_idx")  # activation order: which group each input belongs to
    group_of = np.arange(features) // (features // groups)
    if order is not None:
        if order.shape != (features,):
            module.refuse("weight_g_idx", f"{module.name}.weight_g_idx has shape {list(order.shape)}", str([features]))
            return None
        stated = order.rows(0, features).astype(np.int64)
        if (stated >= 0).all():  # the library fills it with -1 where groups lie in order
            group_of = stated
    if group_of.size and not 0 <= group_of.max() < groups:
        module.refuse("weight_g_idx", f"names group {group_of.max()}", f"groups below {groups}")
        return None
    zeros: np.ndarray | None = None
    if "weight_zero_point" in module.parts:
        points = module.take("weight_zero_point", ("I32",), [(-(-rows * bits // 32), groups)])
        if points is None:
            return None
        columns = np.ascontiguousarray(points.rows(0, points.shape[0]).T)  # packed along the outputs
        zeros = _bytes_to_codes(columns.view(np.uint8), bits)[:, :rows].T

    def raw(start: int, stop: int) -> np.ndarray:
        return packed.rows(start, stop).view(np.uint8)

    def decode(start: int, stop: int) -> Floats:
        values = _bytes_to_codes(raw(start, stop), bits)[:, :features].astype(np.float32)
        offset = np.float32(1 << (bits - 1)) if zeros is None else zeros[start:stop].astype(np.float32)[:, group_of]
        return (values - offset) * scales(start, stop)[:, group_of]

    codes, block = None, block_of(features // groups, features)
    in_order = np.array_equal(group_of, np.arange(features) // (features // groups))
    if zeros is None and in_order and block:
        width, width_of_scales = features * bits // 8, features // block
        codes = StoredCodes(
            bits,
            block,
            lambda start, stop: Quantized(
                np.ascontiguousarray(raw(start, stop)[:, :width]),
                spread(scales(start, stop), width_of_scales),
                bits,
                block,
            ),
            _type_of_scales(module),
        )
    extent = f"block {features // groups}" if groups > 1 else "per channel"
    named = f"int{bits} {extent}" + (" asymmetric" if zeros is not None else "") + ("" if in_order else " reordered")
    return MadeWeight(f"{module.name}.weight", (rows, features), "F32", packed.stored, named, decode, codes)


def _bytes_to_codes(values: np.ndarray, bits: int) -> np.ndarray:
    return nibbles(values) if bits == 4 else values


def _fp4(module: StoredModule, scheme: Scheme) -> MadeWeight | None:
    """E2M1 in pairs, with an E4M3 scale per 16 inputs and one for all (NVFP4), or a power of two per 32 (MXFP4)."""
    packed = module.take("weight_packed", ("U8",))
    if packed is None or not _is_matrix(module, "weight_packed"):
        return None
    rows, features = packed.shape[0], 2 * packed.shape[1]
    scales = _scales(module, scheme, rows, features)
    if scales is None:
        return None
    divisor = np.float32(1)
    if scheme.group == 16:
        whole = module.take("weight_global_scale", SCALES, [(1,), ()])
        if whole is None:
            return None
        divisor = whole.float32(0, 1).reshape(-1)[0]

    def decode(start: int, stop: int) -> Floats:
        return E2M1[nibbles(packed.rows(start, stop))] * spread(scales(start, stop) / divisor, features)

    named = "nvfp4" if scheme.group == 16 else "mxfp4"
    return MadeWeight(f"{module.name}.weight", (rows, features), "F32", packed.stored, named, decode)


def _type_of_scales(module: StoredModule) -> str:
    """F16 where they are stored so; F32 holds all others that belong to integers."""
    return "F16" if module.parts["weight_scale"].dtype == "F16" else "F32"


def _scales(module: StoredModule, scheme: Scheme, rows: int, features: int) -> Decode | None:
    """What gives the scales [n, J] of rows; J is 1 where a row has one, or where there is one in all."""
    group = scheme.group or 0
    if scheme.strategy in ("group", "tensor_group"):
        if group < 1 or features % group:
            module.refuse("weight_scale", f"{features} inputs do not divide into groups of {scheme.group}")
            return None
        shapes: list[tuple[int, ...]] = [(rows, features // group)]
    elif scheme.strategy == "channel":
        shapes = [(rows, 1), (rows,)]
    elif scheme.strategy == "tensor":
        shapes = [(1,), (), (1, 1), (rows, 1)]
    elif scheme.strategy == "block" and scheme.block:
        return _block_scales(module, scheme.block, rows, features)
    else:
        module.refuse("weight_scale", f"is scaled by {scheme.strategy!r}", "tensor, channel, group or block")
        return None
    dtypes = {16: ("F8_E4M3", *SCALES), 32: ("U8", *SCALES)}.get(group, SCALES)
    source = module.take("weight_scale", dtypes, shapes)
    if source is None:
        return None
    return lambda start, stop: _broadcast(source, start, stop)


def _block_scales(module: StoredModule, block: tuple[int, int], rows: int, features: int) -> Decode | None:
    high, wide = block
    if high < 1 or wide < 1 or features % wide:
        module.refuse("weight_scale", f"{features} inputs do not divide into blocks of {wide}")
        return None
    source = module.take("weight_scale", SCALES, [(-(-rows // high), features // wide)])
    if source is None:
        return None

    def read(start: int, stop: int) -> Floats:
        first, last = start // high, -(-stop // high)
        return np.repeat(source.float32(first, last), high, axis=0)[start - first * high : stop - first * high]

    return read


def _broadcast(source: WeightSource, start: int, stop: int) -> Floats:
    """Rows of scales as f32 [n, J], one scale in all as that of each row."""
    count = source.shape[0] if source.shape else 1
    whole = count == 1
    values = source.rows(0, 1) if whole else source.rows(start, stop)
    scales = e8m0(values) if source.dtype == "U8" else _float32(source, values)
    scales = scales.reshape(1 if whole else stop - start, -1)
    return np.broadcast_to(scales, (stop - start, scales.shape[1]))


def _float32(source: WeightSource, values: np.ndarray) -> Floats:
    return values.astype(np.float32) if source.dtype.startswith(("I", "U")) else to_float32(values, source.dtype)


def _is_matrix(module: StoredModule, part: str) -> bool:
    if len(module.parts[part].shape) == 2:
        return True
    module.refuse(part, f"{module.name}.{part} has shape {list(module.parts[part].shape)}", "a matrix")
    return False
