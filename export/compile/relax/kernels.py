"""Calls of our C kernels as tensor expressions: one PrimFunc per kernel and shape, its parts run by TVM's thread pool.

The functions and what they ask of their callers are those of `kernels/arriero_kernels.h`. How many parts a layer is cut
into is the length of `threads` u8 [parts], a graph input whose elements nobody reads: so one library serves any number
of threads. Legend: T tokens, N output features, K input features, E experts, R experts per token, H hidden, F expert
width, B rows of a cache, whose new tokens [1, T] lie one after another as `row_starts` i64 [B + 1] says, D head size.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import tvm.tirx
from tvm import te
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from arriero.errors import ArrieroError

# How the header names the formats, by the dtype that the weight has as a graph input (bf16 comes as its bits).
EXACT_FORMATS = {"float32": 0, "uint16": 1, "float16": 2}
CACHE_FORMATS = {"float32": 0, "float16": 2, "int8": 6}  # by the dtype of a cache
# Exact matrices of at most so many outputs, as a router, are summed alike for any number of tokens, and so are all
# packed ones: `row_product` of the kernels has the number too.
FEW_OUTPUTS = 256
# by the names that `graphs.stored.panels` gives them
FORMATS = {
    **dict(zip(("F32", "BF16", "F16"), EXACT_FORMATS.values(), strict=True)),
    "E4M3": 3,
    "INT8": 4,
    "INT4": 5,
    "INT8_F16": 7,
    "INT4_F16": 8,
    "GRID4_F16": 9,
    "GRID3_F16": 10,
    "GRID2_F16": 11,
}


TWICE = 64  # added to a format of integers: a linear layer's activations are rounded in two steps


@dataclass(frozen=True)
class Format:
    """A weight format: its number in the header, and its block (0 where there are none)."""

    number: int
    block: int = 0

    def twice(self) -> Format:
        """The same, for activations that are rounded in two steps."""
        return replace(self, number=self.number + TWICE)


def linear(form: Format, features: int) -> Callable[..., te.Tensor]:
    """Give f(threads, x [.., K], weight, scales?) -> y [.., N] with N = `features`."""

    def compute(threads: te.Tensor, x: te.Tensor, weight: te.Tensor, *scales: te.Tensor) -> te.Tensor:
        tokens, width = _rows(x), x.shape[-1]

        def body(ins: Sequence[Any], outs: Sequence[Any]) -> None:
            rows, matrix, factors = *_pointers(ins[1:3]), _pointer_or_null(ins[3:])
            sizes = (tokens, features, width, threads.shape[0])
            _run("arriero_run_linear", form.number, form.block, rows, matrix, factors, *_pointers(outs), *sizes)

        return _extern([*x.shape[:-1], features], [threads, x, weight, *scales], body, "linear")

    return compute


def dispatch(gate_up: Format, down: Format, at: Sequence[int], width: int) -> Callable[..., te.Tensor]:
    """Give f(threads, x [.., H], expert_id [.., R], score [.., R], experts [1 + E]) -> y [.., H], F = `width`.

    `at` are the four offsets in a record.
    """
    forms = (gate_up.number, gate_up.block, down.number, down.block, *at)

    def compute(threads: te.Tensor, x: te.Tensor, *rest: te.Tensor) -> te.Tensor:
        expert_id, _, experts = rest

        def body(ins: Sequence[Any], outs: Sequence[Any]) -> None:
            sizes = (_rows(x), expert_id.shape[-1], experts.shape[0] - 1, x.shape[-1], width, threads.shape[0])
            _run("arriero_run_dispatch", *forms, *_pointers(ins[1:]), *_pointers(outs), *sizes)

        return _extern(x.shape, [threads, x, *rest], body, "expert_dispatch")

    return compute


def request(expert_id: te.Tensor, experts: te.Tensor) -> te.Tensor:
    """Give a copy of expert_id [.., R], once those of the layer's `experts` [1 + E] are asked for."""

    def body(ins: Sequence[Any], outs: Sequence[Any]) -> None:
        _run("arriero_run_request", *_pointers(ins), *_pointers(outs), _rows(expert_id), expert_id.shape[-1])

    return _extern(expert_id.shape, [expert_id, experts], body, "expert_request", "int64")


def attention(heads: int, kv_heads: int, chunk: int) -> Callable[..., te.Tensor]:
    """Give f(threads, q, k, v, key_cache, value_cache, positions, row_starts, scales.., wanted) -> out like q.

    It writes k and v into the caches. The two scales are those of an int8 cache. `wanted` [W] are the tokens whose
    outcome is read; none means all.
    """

    def compute(threads: te.Tensor, q: te.Tensor, k: te.Tensor, *rest: te.Tensor) -> te.Tensor:
        rows, _, slots, size = rest[1].shape
        form = CACHE_FORMATS[str(rest[1].dtype)]

        def body(ins: Sequence[Any], outs: Sequence[Any]) -> None:
            query, key, value, keys, values, positions, starts, *scales, wanted = _pointers(ins[1:])
            caches = (keys, values, *(scales or (_null(), _null())))
            sizes = (rows, _rows(q), heads, kv_heads, slots, size, chunk, rest[-1].shape[0], threads.shape[0])
            new = (query, key, value, positions, starts)
            _run("arriero_run_attention", form, *new, *caches, wanted, *_pointers(outs), *sizes)

        return _extern(q.shape, [threads, q, k, *rest], body, "cached_attention")

    return compute


def full_attention(threads: te.Tensor, q: te.Tensor, k: te.Tensor, v: te.Tensor) -> te.Tensor:
    """Give softmax(q k^T / sqrt(D)) v of q, k, v [n, heads, L, D], as q."""

    def body(ins: Sequence[Any], outs: Sequence[Any]) -> None:
        tiles, heads, length, size = q.shape
        sizes = (tiles * heads, length, size, threads.shape[0])
        _run("arriero_run_full_attention", *_pointers(ins[1:]), *_pointers(outs), *sizes)

    return _extern(q.shape, [threads, q, k, v], body, "full_attention")


def add_lora(threads: te.Tensor, *inputs: te.Tensor) -> te.Tensor:
    """Give y [.., N] with the change of each row's adapter, of x [.., K], y, adapter [B], row_starts and two stacks."""
    x, y, adapter, _, a, b = inputs
    adapters, rank, width = a.shape

    def body(ins: Sequence[Any], outs: Sequence[Any]) -> None:
        sizes = (adapter.shape[0], _rows(x), b.shape[1], width, rank, adapters, threads.shape[0])
        _run("arriero_run_add_lora", *_pointers(ins[1:]), *_pointers(outs), *sizes)

    return _extern(y.shape, [threads, *inputs], body, "add_lora")


def exact_format(dtype: str, name: str) -> Format:
    """The format of a weight that stays exact. Raises ArrieroError for a dtype that no kernel reads."""
    if dtype not in EXACT_FORMATS:
        raise ArrieroError(f"no kernel reads {dtype} weights", where=name, expected="float32, bfloat16 or float16")
    return Format(EXACT_FORMATS[dtype])


def named_format(name: str, block: int, weight: str) -> Format:
    """The format `name` of a matrix or of a layer's experts. Raises ArrieroError for one that no kernel reads."""
    if name not in FORMATS:
        raise ArrieroError(f"no kernel reads {name} weights", where=weight, expected=f"one of {', '.join(FORMATS)}")
    return Format(FORMATS[name], block)


def _extern(
    shape: Sequence[Any],
    inputs: Sequence[te.Tensor],
    body: Callable[[Sequence[Any], Sequence[Any]], None],
    name: str,
    result: str = "float32",
) -> te.Tensor:
    def build(ins: Sequence[Any], outs: Sequence[Any]) -> Any:
        with IRBuilder() as builder:
            with T.seq_scope():
                body(ins, outs)
            return builder.get().body  # without the scope's own mark, which code generation does not know

    # declared, because the buffers that `extern` makes by itself have free offsets, and no two such functions are equal
    out, *buffers = (
        tvm.tirx.decl_buffer(shape, dtype, name)
        for shape, dtype in ((shape, result), *((tensor.shape, tensor.dtype) for tensor in inputs))
    )
    return te.extern([shape], list(inputs), build, name, dtype=result, in_buffers=buffers, out_buffers=[out])


def _rows(x: te.Tensor) -> Any:
    return functools.reduce(operator.mul, x.shape[:-1])


def _run(function: str, *arguments: Any) -> None:
    done = tvm.tirx.call_extern("int32", function, *map(_int64, arguments))
    with T.Assert(done == 0, f"TVM's runtime has no memory or no threads for {function}, or a weight cannot be read"):
        pass


def _pointers(buffers: Sequence[Any]) -> list[Any]:
    return [buffer.access_ptr("rw") for buffer in buffers]


def _pointer_or_null(buffers: Sequence[Any]) -> Any:
    return buffers[0].access_ptr("r") if buffers else _null()


def _null() -> Any:
    return tvm.tirx.reinterpret("handle", tvm.tirx.const(0, "uint64"))


def _int64(value: Any) -> Any:
    return tvm.tirx.const(value, "int64") if isinstance(value, int) else value
