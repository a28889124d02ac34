"""Lowers canonical graphs for TensorRT: strongly typed standard operators, and experts in the form that a GPU has.

The types in the graph are the types that are computed in. Float32 stay: norms, router, rotation, SwiGLU, the residual
stream, and what enters and leaves every product; in between a product is as narrow as its scheme. Keys, values and
attention are in the profile's 16-bit format if it has one, else in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from arriero.errors import ArrieroError
from arriero.graphs.functions import CACHED_ATTENTION, EXPERT_DISPATCH
from arriero.graphs.lower.part import Lowering, Phase, WeightTable, lower_part
from arriero.graphs.names import expert_tensors
from arriero.graphs.passes.expand_attention import expand_attention
from arriero.graphs.passes.fold_reshape_shapes import fold_reshape_shapes
from arriero.graphs.passes.fuse_rotary import ROTARY, fuse_rotary
from arriero.graphs.passes.keep_half import keep_half
from arriero.graphs.passes.multiply_in_scheme import multiply_in_scheme
from arriero.graphs.passes.narrow_attention import narrow_attention
from arriero.graphs.passes.replace_dispatch_with_native_moe import replace_dispatch_with_native_moe
from arriero.graphs.passes.replace_dispatch_with_plugins import plugin_form, replace_dispatch_with_plugins
from arriero.graphs.passes.scatter_cache import scatter_cache
from arriero.graphs.passes.sum_products import sum_products
from arriero.graphs.passes.tile_experts import tile_experts
from arriero.graphs.rewrite.scheme_products import TYPES
from arriero.graphs.stored.expert_plugins import BITS
from arriero.graphs.stored.mma_layout import row_words
from arriero.graphs.stored.weight_store import WeightStore
from arriero.profiles.float8 import FP8_SINCE
from arriero.profiles.schemes import Fp8Static, Half, IntBlock, Scheme
from arriero.traits import TRAITS

BF16_SINCE = 80
NATIVE_MOE_ON = (100, 103, 110)
PLUGINS_SINCE = 80  # asynchronous copies came with it; every GPU since then has our kernels
OPSET = ("", 24)  # the first with TensorScatter
Pass = Callable[[ir.Model, WeightStore], int]


def lacks(scheme: Scheme) -> str | None:
    """What of `scheme` TensorRT does not compute; None when it does."""
    if isinstance(scheme, IntBlock):
        # Quantised products take one scale per matrix; blocks go with weights alone, and only in four bits.
        return None if (scheme.bits, scheme.accuracy_level, scheme.grid) == (4, 0, "even") else scheme.description
    return None if scheme.kind in TRAITS["tensorrt"].schemes else scheme.description


def lacks_on(scheme: Scheme, capability: int) -> str | None:
    """What of `scheme` a GPU of compute capability `capability` (89 for 8.9) does not compute; None when it does."""
    if isinstance(scheme, Fp8Static) and capability < FP8_SINCE:
        return f"{scheme.description} on sm_{capability} (fp8 came with sm_{FP8_SINCE})"
    if isinstance(scheme, Half) and scheme.format == "bfloat16" and capability < BF16_SINCE:
        return f"{scheme.description} on sm_{capability} (bfloat16 came with sm_{BF16_SINCE})"
    return None


def activations(assignment: Mapping[str, Scheme]) -> str:
    """The dtype of keys, values and attention, as safetensors names it: the one 16-bit format of a profile, or F32.

    Raises ArrieroError for a profile with both formats.
    """
    formats = {scheme.label.upper() for scheme in assignment.values() if isinstance(scheme, Half)}
    if len(formats) > 1:
        raise ArrieroError(
            "the profile has tensors in both 16-bit formats",
            where=next(name for name, scheme in assignment.items() if isinstance(scheme, Half)),
            expected="float16 or bfloat16 throughout: one cache and one attention go with all layers",
        )
    return formats.pop() if formats else "F32"


def stored_elements(shape: Sequence[int], scheme: Scheme, narrow: str, capability: int) -> int:
    """The elements of the largest tensor that a matrix [N, K] or a stack [E, K, N] becomes, beside `activations`."""
    form = plugin_form(scheme, narrow) if len(shape) == 3 and capability >= PLUGINS_SINCE else None
    if form not in BITS:
        return math.prod(shape)
    experts, features, outputs = shape
    return experts * outputs * row_words(BITS[form], features)


def plugin_forms(assignment: Mapping[str, Scheme], layer: int, capability: int) -> tuple[str, str] | None:
    """The kernels' forms of gate_up and down of a MoE layer that becomes our plugins; None for one that does not."""
    gate_up, down = (assignment[name] for name in expert_tensors(layer))
    native = capability in NATIVE_MOE_ON and isinstance(gate_up, Half) and gate_up == down
    if native or capability < PLUGINS_SINCE:
        return None
    first, second = (plugin_form(scheme, activations(assignment)) for scheme in (gate_up, down))
    return None if first is None or second is None else (first, second)


def lower(part: str, canonical: ir.Model, lowering: Lowering) -> WeightTable:
    """Lower one part as `lower_standard` does, for the GPU of `lowering`.

    Experts take the first form that the GPU has and that knows their scheme: TensorRT's own mixture of experts, our
    kernels as plugins, or tiles, which know all.
    """
    assert lowering.cache.dtype == "float32"
    narrow = activations(lowering.assignment)
    experts: list[Phase] = []
    if lowering.capability in NATIVE_MOE_ON:
        experts.append(Phase("replace_dispatch_with_native_moe", replace_dispatch_with_native_moe, EXPERT_DISPATCH))
    if lowering.capability >= PLUGINS_SINCE:
        run: Pass = lambda model, store: replace_dispatch_with_plugins(model, store, narrow)  # noqa: E731
        experts.append(Phase("replace_dispatch_with_plugins", run, EXPERT_DISPATCH))
    return lower_standard(part, canonical, lowering, [*experts, tiles(narrow)])


def tiles(narrow: str) -> Phase:
    """The form of the experts that knows every scheme, beside activations in `narrow`."""
    return Phase("tile_experts", lambda model, store: tile_experts(model, store, narrow), EXPERT_DISPATCH)


def lower_standard(
    part: str, canonical: ir.Model, lowering: Lowering, experts: Sequence[Phase], sums: bool = False
) -> WeightTable:
    """Write `<part>.onnx` and its weights, with each ExpertDispatch in the first form of `experts` that takes it.

    With `sums` no product with a matrix of the checkpoint is left in float32. Text has the inputs `inputs_embeds`,
    `positions`, `logits_index`, `past_key.{i}`, `past_value.{i}` [B, K, C, D] in the dtype of `activations`; its
    outputs are as in the canonical graph, `present_key.{i}` and `present_value.{i}` to be bound to the pasts' memory.
    One step holds either one row within one chunk, or one token per row. Buffers hold finite numbers, zeros at first.
    The other parts' signatures stay.
    """
    narrow, text = activations(lowering.assignment), lowering.config.text
    dtype = TYPES[narrow]
    phases: list[Phase] = []
    expected: dict[str, int] = {}
    if part == "text":
        phases += [
            Phase("fuse_rotary", lambda model, _: fuse_rotary(model), ROTARY),
            Phase("scatter_cache", lambda model, _: scatter_cache(model, dtype), CACHED_ATTENTION),
            *experts,
        ]
        expected = {
            ROTARY: 2 * sum(layer.rope for layer in text.layers),
            CACHED_ATTENTION: len(text.layers),
            EXPERT_DISPATCH: len(text.moe_layers),
        }
    else:
        phases.append(Phase("narrow_attention", lambda model, _: narrow_attention(model, dtype)))
    if narrow == "F32":
        phases.append(Phase("expand_attention", lambda model, _: expand_attention(model)))
    phases.append(Phase("multiply_in_scheme", lambda model, store: multiply_in_scheme(model, store, narrow)))
    if sums:
        phases.append(Phase("sum_products", lambda model, _: sum_products(model)))
    phases.append(Phase("fold_reshape_shapes", lambda model, _: fold_reshape_shapes(model)))
    phases.append(Phase("keep_half", keep_half))
    return lower_part(part, canonical, lowering, phases, expected, OPSET)
