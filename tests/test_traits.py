"""One record per backend, and nobody who tells backends apart by their names."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from importlib import import_module
from typing import get_args

import pytest
from packaging.requirements import Requirement

from arriero.export.pipeline.sources import PACKAGE
from arriero.profiles.schemes import Scheme
from arriero.traits import BACKENDS, TRAITS, reinstall
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


@pytest.mark.parametrize("name", BACKENDS)
def test_routing_can_be_forced_where_its_lowering_adds_the_input(name: str) -> None:
    lowering = import_module(f"arriero.graphs.lower.{TRAITS[name].module}")
    assert hasattr(lowering, "add_forced_routing") == TRAITS[name].forces_routing


@pytest.mark.parametrize("folder", ["export", "graphs", "runtimes"])
def test_nobody_else_says_a_backends_name(folder: str) -> None:
    names = re.compile("|".join(rf"[\"']{name}[\"']" for name in BACKENDS))
    sayers = {
        source
        for source in sources(folder)
        if not THEIR_OWN.search(source) and names.search((PACKAGE / source).read_text(encoding="utf-8"))
    }
    assert not sayers


@pytest.mark.parametrize("extra", BACKENDS)
def test_what_is_installed_anew_is_what_an_extra_brings_in_our_versions_and_never_we(
    extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No registry has us, and `--force-reinstall` would ask one."""
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = {(one.name, one.specifier) for one in map(Requirement, project["optional-dependencies"][extra])}
    command = reinstall(extra)
    assert command.startswith("pip install --force-reinstall '")
    named = [Requirement(one) for one in re.findall("'([^']*)'", command)]
    assert {(one.name, one.specifier) for one in named} == asked

    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", absent)
    assert set(re.findall("'([^']*)'", reinstall(extra))) == {name for name, _ in asked}


@pytest.mark.parametrize("folder", ["export", "graphs", "runtimes"])
def test_nobody_else_says_how_what_we_need_is_installed(folder: str) -> None:
    command = re.compile(r"pip install [^\n]*arriero")
    assert not [one for one in sources(folder) if command.search((PACKAGE / one).read_text(encoding="utf-8"))]
