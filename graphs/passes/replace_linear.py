"""Gives every product with a checkpoint matrix the kernel that its scheme asks for.

Case 1, exact: FusedMatMul with transB over the checkpoint's own [N, K] rows, so that no transpose is ever made.
Case 2, block-wise integers: MatMulNBits over packed rows.
Case 3, a byte per weight: a linear function of `ai.arriero` (`linear_functions.py`).
"""

from __future__ import annotations

import onnx_ir as ir

from arriero.graphs.functions import DOMAIN
from arriero.graphs.rewrite.linear_weight import TIED, linear_weight
from arriero.graphs.rewrite.nodes import replace_node
from arriero.graphs.stored.channels import ByteScheme, linear_name, store_matrix
from arriero.graphs.stored.rounded import store_rows
from arriero.graphs.stored.weight_store import WeightStore
from arriero.profiles.schemes import Exact, IntBlock


def replace_linear(model: ir.Model, store: WeightStore) -> int:
    """Rewrite each MatMul and transposed, bias-free Gemm over a matrix of the checkpoint; give how many."""
    count = 0
    for node in list(model.graph):
        name = linear_weight(node, store.checkpoint.tensors)
        if name is None:
            continue
        shape = store.checkpoint.tensors[name].shape
        scheme = store.schemes[name]
        if isinstance(scheme, Exact):  # case 1
            replace_node(node, "FusedMatMul", [node.inputs[0], store.exact(name, TIED.get(name))], {"transB": 1})
        elif isinstance(scheme, IntBlock):  # case 2
            blob = (shape[0], shape[1] // scheme.block, scheme.block * scheme.bits // 8)
            packed, scales = store_rows(store, name, scheme, blob)
            attributes = {
                "N": shape[0],
                "K": shape[1],
                "bits": scheme.bits,
                "block_size": scheme.block,
                "accuracy_level": scheme.accuracy_level,
            }
            replace_node(node, "MatMulNBits", [node.inputs[0], packed, scales], attributes)
        else:  # case 3
            assert isinstance(scheme, ByteScheme)
            replace_node(node, linear_name(scheme), [node.inputs[0], *store_matrix(store, name, scheme)], {}, DOMAIN)
        count += 1
    return count
