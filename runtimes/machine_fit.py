"""Whether this machine can run a bundle that is what it says: its processor, and what its backend asks of a machine."""

from __future__ import annotations

from importlib import import_module

from arriero.errors import ArrieroError, MachineLacks
from arriero.runtimes.cpu import architecture, check_features
from arriero.runtimes.manifest import FILE, Manifest
from arriero.traits import TRAITS


def check_machine(manifest: Manifest) -> None:
    """Refuse a bundle that this machine cannot run. Raises MachineLacks with what is missing and what to do."""
    where, target = f"{manifest.bundle / FILE}:target", manifest.target
    if target.backend not in TRAITS:
        raise ArrieroError(
            f"the backend {target.backend!r} is unknown",
            where=f"{where}.backend",
            expected=f"one of {', '.join(TRAITS)}",
            remedy="Use the arriero that built the bundle, or build a target with one of these backends",
        )
    if is_foreign(manifest):
        raise MachineLacks(
            f"the bundle was built for {target.arch} and this machine is {architecture()}",
            where=f"{where}.arch",
            remedy="Build a target for this machine, or one with arch any",
        )
    check_features(target.features, f"{where}.features")
    module = import_module(f"arriero.runtimes.{TRAITS[target.backend].module}")
    if hasattr(module, "check_machine"):  # what only this backend asks of a machine
        module.check_machine(manifest)


def is_foreign(manifest: Manifest) -> bool:
    """Whether the bundle was compiled for another kind of processor than this machine's."""
    return manifest.target.arch != "any" and architecture(manifest.target.arch) != architecture()
