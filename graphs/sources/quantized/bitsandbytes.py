"""bitsandbytes: NF4 and FP4 in blocks, their scales plain or quantised once more, and LLM.int8.

Source of the formats: the library's functional module. A four-bit value is `quant_map[code] * absmax[block]`; with
nested scales `absmax = nested_quant_map[byte] * nested_absmax[block] + offset`. An eight-bit one is
`code * SCB[row] / 127`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from arriero.errors import ArrieroError, raise_together
from arriero.graphs.sources.made_weight import MadeWeight
from arriero.graphs.sources.quantized.codecs import Floats
from arriero.graphs.sources.quantized.modules import StoredModule, split_modules
from arriero.graphs.sources.weight_source import WeightSource

KINDS = ("nf4", "fp4")
STATE = "quant_state.bitsandbytes__"
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", *(STATE + kind for kind in KINDS))
ROWS = ("SCB", "weight_format")
LARGEST_STATE = 65536  # bytes of JSON


@dataclass(frozen=True)
class State:
    """What the JSON beside a four-bit tensor says of it; sizes of blocks in values."""

    shape: tuple[int, ...]
    block: int
    nested_block: int
    offset: float


def decode_tensors(
    settings: Mapping[str, Any], tensors: Mapping[str, WeightSource], where: str
) -> dict[str, WeightSource]:
    """Every tensor of the model. Raises `Problems` for parts that do not fit each other."""
    del settings, where  # what is stored says how
    endings = {"": "weight"} | {f".{part}": part for part in PARTS}
    four_bit, others = split_modules(tensors, endings, unless=("weight",))
    endings = {".weight": "weight"} | {f".{part}": part for part in ROWS}
    eight_bit, decoded = split_modules(others, endings, unless=("weight",))
    problems: list[ArrieroError] = []
    for modules, decode in ((four_bit, _four_bits), (eight_bit, _eight_bits)):
        for module in modules.values():
            if (source := decode(module)) is not None:
                decoded[source.name] = source
            problems += module.problems
    raise_together(problems, "the checkpoint's quantised tensors are not whole")
    return decoded


def _four_bits(module: StoredModule) -> MadeWeight | None:
    """A tensor of any shape as one row of codes, two in a byte, the first in the high half."""
    kind = next((kind for kind in KINDS if STATE + kind in module.parts), KINDS[0])
    weight, table = module.take("weight", ("U8",)), module.take("quant_map", ("F32",), [(16,)])
    stored, stated = module.take("absmax", ("F32", "U8")), module.take(STATE + kind, ("U8",))
    if weight is None or table is None or stored is None or stated is None:
        return None
    state = _state(module, STATE + kind, stated)
    if state is None:
        return None
    values = math.prod(state.shape)
    packed = weight.rows(0, weight.shape[0]).reshape(-1)
    if packed.size != -(-values // 2):
        module.refuse(
            "weight", f"{module.name} holds {packed.size} bytes", f"{-(-values // 2)} for {list(state.shape)}"
        )
        return None
    absmax = _scales(module, stored, state, -(-values // state.block))
    if absmax is None:
        return None
    codes, row = table.float32(0, 16), math.prod(state.shape[1:])

    def decode(start: int, stop: int) -> Floats:
        first, last = start * row, stop * row
        held = packed[first // 2 : -(-last // 2)]
        pairs = np.stack([held >> 4, held & 15], -1).reshape(-1)[first % 2 :][: last - first]
        scales = absmax[first // state.block : -(-last // state.block)]
        spread = np.repeat(scales, state.block)[first % state.block :][: last - first]
        return (codes[pairs] * spread).reshape(stop - start, *state.shape[1:])

    return MadeWeight(module.name, state.shape, "F32", weight.stored, kind, decode)


def _state(module: StoredModule, part: str, source: WeightSource) -> State | None:
    text = source.rows(0, source.shape[0]).tobytes()[:LARGEST_STATE]
    try:
        stated = json.loads(text)
        state = State(
            tuple(int(size) for size in stated["shape"]),
            int(stated["blocksize"]),
            int(stated.get("nested_blocksize", 1)),
            float(stated.get("nested_offset", 0.0)),
        )
        sane = state.block > 0 and state.nested_block > 0 and math.isfinite(state.offset)
        if sane and state.shape and all(size > 0 for size in state.shape):
            return state
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    module.refuse(part, f"{module.name}.{part} does not say the tensor's shape and blocks")
    return None


def _scales(module: StoredModule, stored: WeightSource, state: State, count: int) -> Floats | None:
    """The scale of each block [count]."""
    if stored.shape != (count,):
        module.refuse("absmax", f"{module.name}.absmax has shape {list(stored.shape)}", str([count]))
        return None
    if stored.dtype == "F32":
        return stored.float32(0, count)
    blocks = -(-count // state.nested_block)
    table = module.take("nested_quant_map", ("F32",), [(256,)])
    nested = module.take("nested_absmax", ("F32",), [(blocks,)])
    if table is None or nested is None:
        return None
    scales = np.repeat(nested.float32(0, blocks), state.nested_block)[:count]
    return table.float32(0, 256)[stored.rows(0, count)] * scales + np.float32(state.offset)


def _eight_bits(module: StoredModule) -> MadeWeight | None:
    """A matrix of int8 codes and the largest magnitude of each row."""
    weight = module.take("weight", ("I8",))
    largest = module.take("SCB", ("F32",), [weight.shape[:1]] if weight is not None else ())
    if weight is None or largest is None:
        return None

    def decode(start: int, stop: int) -> Floats:
        return weight.rows(start, stop).astype(np.float32) * largest.float32(start, stop)[:, None] * np.float32(1 / 127)

    return MadeWeight(f"{module.name}.weight", weight.shape, "F32", weight.stored, "int8 per row", decode)
