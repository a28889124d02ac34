"""A graph becomes the same library in every process, whatever lies where in memory."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tvm", reason="needs apache-tvm: pip install 'arriero[tvm]'")

import tvm
from tvm.script import tirx as T

from arriero.export.compile.relax.sort_shapes import sort_shapes
from tests.export.compile.test_compile_tvm import lower
from tests.toys import make_scout_toy

COMPILE = """
import sys
from pathlib import Path
from arriero.export.compile import Device
from arriero.export.compile.tvm import compile_graphs
compile_graphs(Path(sys.argv[1]), ["text"], Device(kernels=Path(sys.argv[2])))
"""


def test_two_processes_compile_the_same_bytes(tmp_path: Path, kernels: Path) -> None:
    lower(make_scout_toy(tmp_path / "toy", 1, vision=False), tmp_path / "lowered")
    made = []
    for name in ("a", "b", "c"):
        shutil.copytree(tmp_path / "lowered", tmp_path / name)
        subprocess.run([sys.executable, "-c", COMPILE, tmp_path / name, kernels], check=True)
        made.append((tmp_path / name / "text.so").read_bytes())
    assert made[0] == made[1] == made[2]


def stored(function: tvm.tirx.PrimFunc) -> list[int]:
    """The places that a function of shapes writes, in order."""
    (made,) = sort_shapes(tvm.IRModule({"f": function})).functions.values()
    return [int(store.indices[0]) for store in made.body.seq]


def test_stores_are_sorted_unless_one_reads_what_another_writes() -> None:
    @T.prim_func(s_tir=True)
    def apart(H: T.Buffer((T.int64(8),), "int64")):  # type: ignore[valid-type]
        H[T.int64(7)] = H[T.int64(0)] * T.int64(2)
        H[T.int64(3)] = H[T.int64(0)] * H[T.int64(1)]
        H[T.int64(5)] = T.int64(4)

    @T.prim_func(s_tir=True)
    def chained(H: T.Buffer((T.int64(8),), "int64")):  # type: ignore[valid-type]
        H[T.int64(7)] = H[T.int64(0)] * T.int64(2)
        H[T.int64(3)] = H[T.int64(7)] * H[T.int64(1)]

    assert stored(apart) == [3, 5, 7]
    assert stored(chained) == [7, 3]


def test_functions_that_are_equal_once_sorted_become_one_whatever_names_there_were() -> None:
    @T.prim_func(s_tir=True)
    def one(H: T.Buffer((T.int64(8),), "int64")):  # type: ignore[valid-type]
        H[T.int64(7)] = H[T.int64(0)] * T.int64(2)
        H[T.int64(5)] = T.int64(4)

    @T.prim_func(s_tir=True)
    def turned(H: T.Buffer((T.int64(8),), "int64")):  # type: ignore[valid-type]
        H[T.int64(5)] = T.int64(4)
        H[T.int64(7)] = H[T.int64(0)] * T.int64(2)

    @T.prim_func(s_tir=True)
    def other(H: T.Buffer((T.int64(8),), "int64")):  # type: ignore[valid-type]
        H[T.int64(7)] = H[T.int64(0)] * T.int64(3)
        H[T.int64(5)] = T.int64(4)

    def names(*functions: tvm.tirx.PrimFunc) -> list[tuple[str, tvm.tirx.PrimFunc]]:
        made = sort_shapes(tvm.IRModule({f"f{number or ''}": one for number, one in enumerate(functions)})).functions
        return sorted((name.name_hint, function) for name, function in made.items())

    expected = names(one, other)
    assert [name for name, _ in expected] == ["f", "f1"]
    for functions in ((one, turned, other), (turned, one, other, turned), (turned, other, one)):
        for (name, function), (known, right) in zip(names(*functions), expected, strict=True):
            assert name == known
            tvm.ir.assert_structural_equal(function, right)
