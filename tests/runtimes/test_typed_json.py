"""JSON into dataclasses: every kind of field, and every way to be wrong, named with its place."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import pytest

from arriero.errors import ArrieroError
from arriero.runtimes.typed_json import decode


@dataclass(frozen=True)
class Leaf:
    size: int
    share: float = 0.5


@dataclass(frozen=True)
class Tree:
    name: str
    leaves: tuple[Leaf, ...]
    counts: dict[str, tuple[int, ...]] = field(default_factory=dict)
    best: Leaf | None = None
    whole: bool = False


def read(value: Any) -> Tree:
    return decode(Tree, value, "file.json:tree", "Do it again")


def test_what_was_written_is_read() -> None:
    tree = Tree("oak", (Leaf(1), Leaf(2, 0.25)), {"a": (1, 2)}, Leaf(3), True)
    assert read({**asdict(tree), "leaves": [asdict(leaf) for leaf in tree.leaves], "counts": {"a": [1, 2]}}) == tree


def test_defaults_stand_in_and_unknown_keys_are_left_out() -> None:
    assert read({"name": "oak", "leaves": [], "height": 3}) == Tree("oak", ())
    assert read({"name": "oak", "leaves": [{"size": 1, "share": 1}]}).leaves[0].share == 1.0


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ([], r"file.json:tree: an entry has the wrong shape: \[\]; expected a mapping. Do it again"),
        ({"name": "oak"}, "file.json:tree: the key 'leaves' is missing"),
        ({"name": 3, "leaves": []}, "file.json:tree.name: an entry has the wrong shape: 3; expected a value of type"),
        ({"name": "oak", "leaves": {}}, r"tree.leaves: an entry has the wrong shape: \{\}; expected a list"),
        ({"name": "oak", "leaves": [{"size": "1"}]}, r"tree.leaves\[0\].size: an entry has the wrong shape: '1'"),
        ({"name": "oak", "leaves": [{"size": True}]}, r"tree.leaves\[0\].size: an entry has the wrong shape: True"),
        ({"name": "oak", "leaves": [{"size": 1.5}]}, r"tree.leaves\[0\].size: an entry has the wrong shape: 1.5"),
        ({"name": "oak", "leaves": [{"size": 1, "share": "x"}]}, r"leaves\[0\].share: an entry has the wrong shape"),
        ({"name": "oak", "leaves": [], "counts": {"a": 1}}, "tree.counts.a: an entry has the wrong shape: 1"),
        ({"name": "oak", "leaves": [], "best": {}}, "tree.best: the key 'size' is missing"),
        ({"name": "oak", "leaves": [], "whole": 1}, "tree.whole: an entry has the wrong shape: 1"),
        ({"name": "o" * 99, "leaves": ["x" * 99]}, r"wrong shape: 'x{39}\.\.; expected a mapping"),
    ],
)
def test_what_does_not_fit_is_named(value: Any, sentence: str) -> None:
    with pytest.raises(ArrieroError, match=sentence):
        read(value)
