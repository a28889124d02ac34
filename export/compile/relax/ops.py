"""Operators that TVM generates code for, as tensor expressions: those its ONNX importer lacks or lowers badly on CPUs.

Legend: B batch, S sequence, D head size, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import tvm.tirx
from tvm import te
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T


def lookup(table: te.Tensor, ids: te.Tensor) -> te.Tensor:
    """Rows of `table` [V, H] (f32, f16, or the bits of bf16) at `ids` [B, S], as f32 [B, S, H].

    The table lies in the checkpoint's file, so it is aligned to its elements only.
    """
    shape = (*ids.shape, table.shape[1])

    def widened(value: Any) -> Any:
        if table.dtype == "uint16":  # bf16 is the upper half of an f32
            return tvm.tirx.reinterpret("float32", value.astype("uint32") << 16)
        return value.astype("float32")

    def body(ins: Any, outs: Any) -> Any:
        with IRBuilder() as builder:
            (rows, numbers), (out,) = map(T.buffer_proxy, ins), map(T.buffer_proxy, outs)
            with T.grid(*shape) as at:
                out[at] = widened(rows[numbers[at[:-1]], at[-1]])
            return builder.get()

    item = 4 if table.dtype == "float32" else 2
    arguments = [
        tvm.tirx.decl_buffer(table.shape, table.dtype, "table", data_alignment=item),
        tvm.tirx.decl_buffer(ids.shape, ids.dtype, "ids"),
    ]
    out = tvm.tirx.decl_buffer(shape, "float32", "rows")
    return te.extern([shape], [table, ids], body, "lookup", dtype="float32", in_buffers=arguments, out_buffers=[out])


def exponential(value: Any) -> Any:
    """e^value of an f32, cut to [-87, 88], NaN kept: arithmetic that vectorises, where a library's `exp` is a call.

    Cody-Waite reduction by ln 2 and a Taylor polynomial of degree 7, as in `kernels/exponential.h`.
    """
    cut = tvm.tirx.min(tvm.tirx.max(value, _f32(-87.0)), _f32(88.0))
    whole = tvm.tirx.floor(cut * _f32(1.44269504) + _f32(0.5))
    rest = cut - whole * _f32(0.693359375) + whole * _f32(2.12194440e-4)
    total: Any = _f32(1 / 5040)
    for factor in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
        total = total * rest + _f32(factor)
    power = tvm.tirx.reinterpret("float32", (whole.astype("int32") + 127) << 23)
    return tvm.tirx.Select(tvm.tirx.isnan(value), value, total * power)


def sigmoid(x: te.Tensor) -> te.Tensor:
    """1 / (1 + e^-x), element by element."""
    return te.compute(x.shape, lambda *at: _f32(1.0) / (_f32(1.0) + exponential(-x[at])), name="sigmoid")


def gelu(x: te.Tensor) -> te.Tensor:
    """x times the normal distribution below x, element by element: x (1 + erf(x / sqrt 2)) / 2.

    erf is within 1.5e-7 (Abramowitz and Stegun 1964, 7.1.26), and arithmetic that vectorises.
    """

    def element(*at: Any) -> Any:
        value = x[at]
        side = tvm.tirx.abs(value) * _f32(math.sqrt(0.5))
        t = _f32(1.0) / (_f32(1.0) + side * _f32(0.3275911))
        total: Any = _f32(1.061405429)
        for factor in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
            total = total * t + _f32(factor)
        beyond = total * t * exponential(-side * side) * _f32(0.5)  # of the distribution, on the far side of |x|
        return value * tvm.tirx.Select(value < _f32(0.0), beyond, _f32(1.0) - beyond)

    return te.compute(x.shape, element, name="gelu")


def _f32(value: float) -> Any:
    return tvm.tirx.const(value, "float32")


def rotate(heads: int) -> Callable[..., te.Tensor]:
    """Give f(x [B, S, heads*D], cos, sin [B, S, D/2]): the rotation of interleaved pairs (RoFormer)."""

    def compute(x: te.Tensor, cos: te.Tensor, sin: te.Tensor) -> te.Tensor:
        size = int(x.shape[2]) // heads

        def element(b: Any, s: Any, i: Any) -> Any:
            pair, odd = (i % size) // 2, i % 2
            other = x[b, s, i + 1 - 2 * odd]
            return x[b, s, i] * cos[b, s, pair] + tvm.tirx.if_then_else(odd == 0, -other, other) * sin[b, s, pair]

        return te.compute(x.shape, element, name="rotate")

    return compute


def route(count: int) -> Callable[[te.Tensor, te.Tensor], list[te.Tensor]]:
    """Give f(logits [.., E], forced [F, k]) -> the `count` chosen experts' logits [.., k] and their ids i64 [.., k].

    The largest are chosen, the lower id first among equals; but of a row in `forced` its ids, where they are not below
    0. `forced` has as many rows as there are tokens, or none.
    """

    def compute(logits: te.Tensor, forced: te.Tensor) -> list[te.Tensor]:
        shape = (*logits.shape[:-1], count)

        def body(ins: Any, outs: Any) -> Any:
            with IRBuilder() as builder:
                (given, own), (values, ids) = map(T.buffer_proxy, ins), map(T.buffer_proxy, outs)
                with T.grid(*shape[:-1]) as row:
                    for rank in range(count):
                        at = (*row, rank)
                        values[at] = tvm.tirx.min_value("float32")
                        ids[at] = tvm.tirx.const(0, "int64")
                        with T.serial(0, logits.shape[-1]) as e:
                            free = [ids[(*row, earlier)] != e for earlier in range(rank)]
                            with T.If(tvm.tirx.all(given[(*row, e)] > values[at], *free)), T.Then():
                                values[at] = given[(*row, e)]
                                ids[at] = e
                    token: Any = 0
                    for index, size in zip(row, shape[:-1], strict=True):
                        token = token * size + index
                    with T.If(forced.shape[0] > 0), T.Then():
                        for rank in range(count):
                            with T.If(own[token, rank] >= 0), T.Then():
                                ids[(*row, rank)] = own[token, rank]
                                values[(*row, rank)] = given[(*row, own[token, rank])]
                return builder.get()

        outs = [tvm.tirx.decl_buffer(shape, dtype, "route") for dtype in ("float32", "int64")]
        buffers = [
            tvm.tirx.decl_buffer(tensor.shape, tensor.dtype, name)
            for name, tensor in (("logits", logits), ("forced", forced))
        ]
        inputs, dtypes = [logits, forced], ["float32", "int64"]
        return te.extern([shape, shape], inputs, body, "route", dtype=dtypes, in_buffers=buffers, out_buffers=outs)

    return compute
