"""Keeps batch and sequence apart around feed-forward layers, which the trace flattens to tokens for PyTorch's sake.

Every operator in between works on rows, so that [B, S, H] does as well as [B*S, H]; and sizes that are products of
others are what an importer can do least with.
"""

from __future__ import annotations

import onnx_ir as ir

TOKEN_RESHAPE = "token Reshape"


def keep_token_axes(model: ir.Model) -> int:
    """Remove each Reshape [B, S, H] -> [B*S, H] and its inverse; give how many went.

    Graph outputs in between (`expert_id.{i}`) become [B, S, k].
    """
    reshapes = [node for node in model.graph if node.op_type == "Reshape" and _folds_tokens(node)]
    for node in reshapes:
        source = node.inputs[0]
        assert source is not None
        node.outputs[0].replace_all_uses_with(source)
        model.graph.remove(node, safe=True)
    for value in model.graph.outputs:
        if value.shape is not None and len(value.shape) == 2 and reshapes:
            value.shape = ir.Shape(["batch", "seq", value.shape[1]])
    return len(reshapes)


def _folds_tokens(node: ir.Node) -> bool:
    before, after = (value.shape if value is not None else None for value in (node.inputs[0], node.outputs[0]))
    if before is None or after is None or before[-1] != after[-1]:
        return False
    return sorted((len(before), len(after))) == [2, 3] and not isinstance(before[0], int)
