"""Has the last layer computed, but for its keys and values, for those tokens alone that get logits.

Of a prompt that is its last one. Keys and values are for whoever comes later; what attention, the output projection,
the router and the experts of the last layer make of another token nobody reads.
"""

from __future__ import annotations

from tvm import relax

from arriero.export.compile.relax.import_graph import INDEX
from arriero.graphs.passes.cache_in_place import ROW_STARTS

EMBEDS = "inputs_embeds"


def take_early(function: relax.Function) -> relax.Function:
    """The function, whose only result is logits, with the tokens of these taken after the last use of `ROW_STARTS`.

    What uses that wants tokens as they lie in rows: attention, which is told whose outcome is wanted, and adapters.
    Whatever else a text graph does is done to each token by itself, along the axis that is taken from.
    """
    named = {str(var.name): var for var in function.params}
    rows, index = named[ROW_STARTS], named[INDEX]
    sequence, wanted = named[EMBEDS].ty.shape[1], index.ty.shape[0]
    *blocks, block = function.body.blocks
    bindings = list(block.bindings)
    last = max(number for number, binding in enumerate(bindings) if _uses(binding, rows))
    bindings[last] = _for_some(bindings[last], index)
    edge = last + 1
    while isinstance(bindings[edge].value, relax.TupleGetItem):  # of the attention that writes into its cache
        edge += 1
    tail = relax.SeqExpr([relax.DataflowBlock(bindings[edge:])], function.body.body)
    inner = [var for var in relax.analysis.free_vars(tail) if isinstance(var.ty, relax.TensorType)]
    few = relax.Function(inner, tail, function.ret_ty).bind_symbolic_vars({sequence: wanted})
    entering = [
        relax.VarBinding(var, relax.op.take(outer, index, axis=1, mode="clip"))
        for var, outer in zip(few.params, inner, strict=True)
        if not var.same_as(outer)
    ]
    (after,) = few.body.blocks
    taken = [_without_take(binding) for binding in after.bindings]
    body = relax.SeqExpr([*blocks, relax.DataflowBlock([*bindings[:edge], *entering, *taken])], few.body.body)
    return relax.Function(function.params, body, few.ret_ty, attrs=function.attrs)


def _uses(binding: relax.Binding, var: relax.Var) -> bool:
    return any(used.same_as(var) for used in relax.analysis.free_vars(binding.value))


def _for_some(binding: relax.Binding, wanted: relax.Var) -> relax.Binding:
    """An attention for those tokens alone that are `wanted`; anything else as it is."""
    call = binding.value
    if call.op.name != "relax.call_tir_inplace":
        return binding
    function, arguments = call.args
    some = relax.Tuple([*arguments.fields[:-1], wanted])
    return relax.VarBinding(binding.var, relax.Call(call.op, [function, some], call.attrs, call.ty_args))


def _without_take(binding: relax.Binding) -> relax.Binding:
    """The binding, or of the take of tokens that were taken before these themselves."""
    value = binding.value
    if isinstance(value, relax.Call) and value.op.name == "relax.take" and value.attrs.axis == 1:
        return relax.VarBinding(binding.var, value.args[0])
    return binding
