"""The streaming writer: read back by the safetensors library, bounded in memory, resumable, never half a file."""

from __future__ import annotations

import contextlib
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from arriero.graphs.sources.safetensors_header import read_header
from arriero.graphs.stored.safetensors_writer import ALIGNMENT, Group, Layout, Spec, plan_layout, row_slices, write_all
from arriero.profiles.journal import FILE, Journal, Region
from tests.flip import flip


def group(name: str, array: np.ndarray, dtype: str, rows: int = 1) -> Group:
    return Group(
        (Spec(name, dtype, array.shape),),
        lambda: ((array[start : start + rows],) for start in range(0, len(array), rows)),
    )


def write(path: Path, groups: list[Group], *watchers: Callable[..., None]) -> Layout:
    return write_all(path.parent, {path.name: groups}, *watchers)[path.name]


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "bytes": rng.integers(0, 255, (3, 5), dtype=np.uint8),
        "floats": rng.standard_normal((7, 3)).astype(np.float32),
        "half": rng.standard_normal((5, 2)).astype(np.float16),
    }


def groups_of(arrays: dict[str, np.ndarray]) -> list[Group]:
    dtypes = {"uint8": "U8", "float32": "F32", "float16": "F16"}
    return [group(name, array, dtypes[str(array.dtype)]) for name, array in arrays.items()]


def test_the_file_is_sound_safetensors_with_aligned_data(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    calls: list[tuple[int, int]] = []
    path = tmp_path / "weights" / "w.safetensors"
    layout = write(path, groups_of(arrays), lambda done, total: calls.append((done, total)))
    loaded = load_file(path)
    assert set(loaded) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array)
        assert layout.offsets[name] % array.itemsize == 0
    assert min(layout.offsets.values()) % ALIGNMENT == 0
    assert {info.name: info.offset for info in read_header(path)} == layout.offsets
    total = sum(array.nbytes for array in arrays.values())
    assert calls[-1] == (total, total)
    assert calls == sorted(calls)
    assert sorted(entry.name for entry in path.parent.iterdir()) == [FILE, "w.safetensors"]


def test_tensors_made_together_land_apart(tmp_path: Path) -> None:
    first, second = np.arange(6, dtype=np.uint8).reshape(3, 2), np.arange(3, dtype=np.float32).reshape(3, 1)
    together = Group(
        (Spec("q", "U8", (3, 2)), Spec("s", "F32", (3, 1))),
        lambda: ((first[i : i + 1], second[i : i + 1]) for i in range(3)),
    )
    write(tmp_path / "w", [together])
    loaded = load_file(tmp_path / "w")
    np.testing.assert_array_equal(loaded["q"], first)
    np.testing.assert_array_equal(loaded["s"], second)


def watched(made: list[str], name: str, inner: Group, fail: bool) -> Group:
    """The group `inner`, which notes in `made` that it is made, or instead is as if killed there."""

    def pieces() -> Iterator[tuple[np.ndarray, ...]]:
        if fail:
            raise KeyboardInterrupt
        made.append(name)
        yield from inner.pieces()

    return Group(inner.specs, pieces)


def test_a_killed_write_goes_on_where_it_stopped(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    path, made = tmp_path / "w.safetensors", list[str]()

    names = list(arrays)
    with pytest.raises(KeyboardInterrupt):
        write(path, [watched(made, n, g, n == names[2]) for n, g in zip(names, groups_of(arrays), strict=True)])
    assert not path.exists()
    assert made == names[:2]
    write(path, [watched(made, n, g, False) for n, g in zip(names, groups_of(arrays), strict=True)])
    assert made == names  # the first two were not made again
    write(
        path, [watched(made, n, g, True) for n, g in zip(names, groups_of(arrays), strict=True)]
    )  # nothing left to make
    for name, array in arrays.items():
        np.testing.assert_array_equal(load_file(path)[name], array)


@pytest.mark.parametrize("finished", [False, True])
def test_a_group_that_was_changed_since_is_made_again(
    tmp_path: Path, arrays: dict[str, np.ndarray], finished: bool
) -> None:
    path, made, told = tmp_path / "w.safetensors", list[str](), list[str]()

    def groups(fail: bool) -> list[Group]:
        return [watched(made, n, g, fail and n == "half") for n, g in zip(arrays, groups_of(arrays), strict=True)]

    with contextlib.suppress(KeyboardInterrupt):
        write(path, groups(not finished))
    left = path if finished else tmp_path / "w.safetensors.partial"
    flip(left, plan_layout(groups_of(arrays)).offsets["floats"] + 2)
    made.clear()
    write(path, groups(False), lambda *_: None, told.append)
    assert made == (["floats"] if finished else ["floats", "half"])
    assert [str(tmp_path) in line and "group 1 of w.safetensors" in line for line in told] == [True]
    for name, array in arrays.items():
        np.testing.assert_array_equal(load_file(path)[name], array)


def test_a_partial_of_another_layout_is_not_continued(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    path = tmp_path / "w.safetensors"
    path.with_name("w.safetensors.partial").write_bytes(b"x" * 9000)
    Journal(tmp_path).keep("group 0 of w.safetensors", Region.whole(tmp_path, "w.safetensors.partial"))
    write(path, groups_of(arrays))
    np.testing.assert_array_equal(load_file(path)["bytes"], arrays["bytes"])


@pytest.mark.parametrize("shape", [(2, 3), (4, 3)])
def test_pieces_that_are_not_the_planned_bytes_are_refused(tmp_path: Path, shape: tuple[int, int]) -> None:
    wrong = Group((Spec("w", "F32", (3, 3)),), lambda: [(np.zeros(shape, np.float32),)])
    with pytest.raises(ValueError, match="36 were planned"):
        write(tmp_path / "w", [wrong])
    assert not (tmp_path / "w").exists()


def test_names_are_unique() -> None:
    twin = group("w", np.zeros((1, 1), np.float32), "F32")
    with pytest.raises(ValueError, match="two tensors are called w"):
        plan_layout([twin, twin])


def test_memory_stays_at_one_piece(tmp_path: Path) -> None:
    row = 64 * 1024
    made: Callable[[], Iterator[tuple[np.ndarray, ...]]] = lambda: (  # noqa: E731
        (np.full((1, row), i, np.uint8),) for i in range(256)
    )
    tracemalloc.start()
    write(tmp_path / "w", [Group((Spec("w", "U8", (256, row)),), made)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * row  # of the 256 rows that were written


def test_row_slices_cover_everything_once() -> None:
    assert list(row_slices(5, 2**30)) == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]
    assert list(row_slices(5, 8)) == [(0, 5)]
    assert list(row_slices(0, 8)) == []
