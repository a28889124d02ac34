"""One record per backend, and nobody who tells backends apart by their names."""

from __future__ import annotations

import re
from importlib import import_module
from typing import get_args

import pytest

from arriero.export.pipeline.sources import PACKAGE
from arriero.profiles.schemes import Scheme
from arriero.traits import BACKENDS, TRAITS
from docs.rooms import sources

# A backend's own modules, and NVIDIA's two products behind one door, may say their names.
THEIR_OWN = re.compile(r"tensorrt|tvm|onnxruntime|/nvidia/|/relax/|/cuda/|machine/doctor")


def test_every_record_goes_by_its_name() -> None:
    assert {name: traits.name for name, traits in TRAITS.items()} == dict(zip(BACKENDS, BACKENDS, strict=True))


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_is_a_module_of_one_name_in_three_places(name: str) -> None:
    module = TRAITS[name].module
    for place in ("graphs/lower", "export/compile", "runtimes"):
        assert (PACKAGE / place / f"{module}.py").is_file(), place


@pytest.mark.parametrize("name", BACKENDS)
def test_its_schemes_are_those_that_its_lowering_takes(name: str) -> None:
    """What the record lists is taken in some form; what it does not list is refused by name."""
    lowering = import_module(f"arriero.graphs.lower.{TRAITS[name].module}")
    kinds = {get_args(kind.model_fields["kind"].annotation)[0]: kind for kind in get_args(get_args(Scheme)[0])}
    assert set(TRAITS[name].schemes) <= set(kinds)
    for label in set(kinds) - set(TRAITS[name].schemes) - {"chosen", "as_stored"}:  # which the checkpoint settles
        fields = {"half": {"format": "float16"}, "fp8": {"activations": "fp8"}}.get(label, {})
        assert lowering.lacks(kinds[label](kind=label, **fields)) is not None, label


@pytest.mark.parametrize("folder", ["export", "graphs", "runtimes"])
def test_nobody_else_says_a_backends_name(folder: str) -> None:
    names = re.compile("|".join(rf"[\"']{name}[\"']" for name in BACKENDS))
    sayers = {
        source
        for source in sources(folder)
        if not THEIR_OWN.search(source) and names.search((PACKAGE / source).read_text(encoding="utf-8"))
    }
    assert not sayers
