"""Gives the caches that attention writes into the dtype in which keys and values are kept.

Legend: K key/value heads, D head size.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from arriero.graphs.functions import CACHED_ATTENTION
from arriero.graphs.rewrite.nodes import add_constant
from arriero.profiles.kv_cache import StoredCache

# Where the two caches, and the scales of int8, stand among the inputs of attention that writes in place.
CACHES, SCALES_AT = slice(3, 5), 7


def narrow_cache(model: ir.Model, cache: StoredCache) -> int:
    """Let every CachedAttention keep keys and values in `cache`; give how many do so in less than float32.

    For int8 a node gets its layer's two scales f32 [K, D] as inputs.
    """
    if cache.dtype == "float32":
        return 0
    nodes = [node for node in model.graph if node.op_type == CACHED_ATTENTION]
    for node in nodes:
        buffers = [value for value in node.inputs[CACHES] if value is not None]
        for value in buffers:
            value.type = ir.TensorType(ir.DataType.from_numpy(np.dtype(cache.dtype)))
        if cache.scales:
            layer = cache.scales[int(str(buffers[0].name).removeprefix("past_key."))]
            node.resize_inputs(SCALES_AT + 2)
            for index, scales in enumerate((layer.key, layer.value)):
                node.replace_input_with(SCALES_AT + index, add_constant(node, ir.tensor(scales.astype(np.float32))))
    return len(nodes)
