"""Makes the key/value buffers of every GroupQueryAttention int8, with static scales.

The kernel rounds new keys and values as it writes them, and attends to what it wrote: a token sees its own rounded key.
Legend: K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from arriero.graphs.rewrite.nodes import add_constant
from arriero.profiles.kv_cache import CacheScales

# Where k_scale and v_scale stand among the operator's inputs.
SCALES_AT = 12
INT8_CACHE = "int8 cache"


def quantize_cache(model: ir.Model, scales: Sequence[CacheScales]) -> int:
    """Give each attention node its layer's entry of `scales`, and int8 cache values; give how many nodes."""
    nodes = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    for node in nodes:
        layer = int(str(node.outputs[1].name).removeprefix("present_key."))
        node.resize_inputs(SCALES_AT + 2)
        for index, steps in enumerate((scales[layer].key, scales[layer].value)):
            node.replace_input_with(
                SCALES_AT + index, add_constant(node, ir.tensor(steps[None, :, None].astype(np.float32)))
            )
        for attribute in ir.convenience.convert_attributes(
            {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
        ):
            node.attributes.add(attribute)
        for value in (*node.inputs[3:5], *node.outputs[1:]):
            assert value is not None
            value.type = ir.TensorType(ir.DataType.INT8)
    return len(nodes)
