"""What this machine has and lacks for each backend, and how to get what is missing."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from arriero.errors import ArrieroError, MachineLacks
from arriero.export.compile.build_kernels import LEVELS, check_compiler
from arriero.export.machine.budget import free_disk
from arriero.export.machine.checks import Check, status
from arriero.export.machine.gpu_checks import gpu_checks
from arriero.export.machine.versions import version_of
from arriero.runtimes.broken_package import does_not_load
from arriero.runtimes.cpu import MACHINE_CLASSES, architecture, cpu_features, describe_processor
from arriero.runtimes.load_onnxruntime import load_onnxruntime
from arriero.runtimes.memory import available_memory, total_memory
from arriero.runtimes.tvm_graph import load_runtime
from arriero.sizes import human_bytes
from arriero.traits import BACKENDS, BUILD, RUN, SHARED_PACKAGES, TRAITS, Package, install, reinstall

LEAST_MEMORY, LEAST_DISK = 2 << 30, 1 << 30
PYTHON = (3, 11)
# What loads the packages of a backend for processors, and says what of them does not load.
LOADERS: dict[str, Callable[[], Any]] = {"onnxruntime": load_onnxruntime, "tvm": load_runtime}


@dataclass(frozen=True)
class Diagnosis:
    """All checks, those of the machine and those of each backend."""

    machine: tuple[Check, ...]
    backends: dict[str, tuple[Check, ...]]

    def can(self, action: str, backend: str) -> bool:
        """Whether `action` ("build" or "run") is possible for `backend` here."""
        return not self.lacks(action, backend)

    def lacks(self, action: str, backend: str) -> list[str]:
        """The names of what stops `action` for `backend`."""
        checks = (*self.machine, *self.backends[backend])
        return [check.name for check in checks if check.status != "ok" and action in check.needed_for]

    @property
    def is_device(self) -> bool:
        """Whether this machine is to run bundles alone: nothing of what only builds need is installed."""
        return all(version_of(package.name) is None for package in SHARED_PACKAGES if package.extra == "export")

    def exit_code(self, backend: str | None = None) -> int:
        """Give 3 when what this machine is for, to build or on a device to run, is impossible for `backend`, or for
        every backend when none is given; else 0.
        """
        asked = [backend] if backend else list(self.backends)
        return 0 if any(self.can(RUN if self.is_device else BUILD, name) for name in asked) else 3

    def to_json(self) -> dict[str, Any]:
        """Give the diagnosis as JSON values."""
        can = {name: {BUILD: self.can(BUILD, name), RUN: self.can(RUN, name)} for name in self.backends}
        return {**asdict(self), "can": can}


def diagnose(folder: Path, backend: str | None = None, backends: Collection[str] = BACKENDS) -> Diagnosis:
    """Look at this machine, with the disk under `folder`, for one backend or several.

    Raises `ArrieroError` for a backend we do not have.
    """
    if backend is not None and backend not in TRAITS:
        known = ", ".join(TRAITS)
        raise ArrieroError(f"there is no backend {backend!r}", expected=f"one of {known}", remedy="Choose one of these")
    machine = (_python(), *_hardware(), _memory(), _disk(folder), *map(_library, SHARED_PACKAGES))
    asked = [backend] if backend else [name for name in TRAITS if name in backends]
    return Diagnosis(machine, {name: _backend(name) for name in asked})


def installed_backends() -> tuple[str, ...]:
    """The backends whose own packages are all here; every backend where none is."""
    there = [
        name for name, traits in TRAITS.items() if all(_library(package).status == "ok" for package in traits.packages)
    ]
    return tuple(there) or BACKENDS


def _python() -> Check:
    version = ".".join(map(str, PYTHON))
    ok = sys.version_info >= PYTHON
    remedy = None if ok else f"Install Python {version} or newer"
    return Check("python", status(ok), platform.python_version(), (BUILD, RUN), remedy)


def _hardware() -> tuple[Check, Check]:
    have = cpu_features()
    cores = Check("cpu", "ok", f"{describe_processor()}, {platform.machine()}", ())
    sets = list(MACHINE_CLASSES.get(architecture(), {}).values())
    least = sets[-1] if sets else ""
    ok = least in have or not have
    remedy = None if ok else f"Without {least} quantised models run, but slowly: use a newer processor"
    listed = ", ".join(feature for feature in sets if feature in have) if have else "not known on this system"
    return cores, Check("cpu features", status(ok), listed or "none", (), remedy)


def _memory() -> Check:
    free, total = available_memory(), total_memory()
    if free is None or total is None:
        return Check("memory", "ok", "not known on this system", ())
    ok = free >= LEAST_MEMORY
    remedy = None if ok else f"Free some: a build needs at least {human_bytes(LEAST_MEMORY)}"
    return Check("memory", status(ok), f"{human_bytes(free)} free of {human_bytes(total)}", (BUILD,), remedy)


def _disk(folder: Path) -> Check:
    free = free_disk(folder)
    ok = free >= LEAST_DISK
    remedy = None if ok else f"Free some: a build needs at least {human_bytes(LEAST_DISK)}"
    return Check("disk", status(ok), f"{human_bytes(free)} free in {folder.absolute()}", (BUILD,), remedy)


def find_lacks(packages: Iterable[Package]) -> list[ArrieroError]:
    """What is not installed, or too old, of `packages`."""
    checks = [(package, _library(package)) for package in packages]
    return [
        MachineLacks(
            f"{package.name} is {'not installed' if check.found == 'not installed' else f'version {check.found}'}",
            expected=f"{package.least} or newer",
            remedy=f"Install it with `{install(package.extra)}`",
        )
        for package, check in checks
        if check.status != "ok"
    ]


def _library(package: Package) -> Check:
    installed = version_of(package.name)
    if installed is None and package.instead and (whole := version_of(package.instead)):
        return Check(package.name, "ok", f"{package.instead} {whole} instead", package.needed_for)
    ok = installed is not None and _numbers(installed) >= _numbers(package.least)
    remedy = None if ok else f"{install(package.extra)} (it needs {package.name} {package.least} or newer)"
    return Check(package.name, status(ok), installed or "not installed", package.needed_for, remedy)


def _backend(name: str) -> tuple[Check, ...]:
    checks = tuple(map(_library, TRAITS[name].packages))
    if TRAITS[name].compiles_for == "gpu":
        return (*checks, *gpu_checks(name))
    if any(check.status != "ok" for check in checks):
        return checks
    return (*checks, *{"onnxruntime": _onnxruntime_providers, "tvm": _tvm_tools}[name]())


def load_packages(backend: str) -> Any:
    """Import what a backend for processors runs on, for real: a library that is installed may still not load.

    Gives its module. Raises MachineLacks, whatever a broken library raises.
    """
    try:
        return LOADERS[backend]()
    except MachineLacks:
        raise
    except Exception as error:
        raise does_not_load(backend, error) from error


def _onnxruntime_providers() -> tuple[Check, ...]:
    try:
        providers = load_packages("onnxruntime").get_available_providers()
    except MachineLacks as lack:
        return (Check("onnxruntime loads", "missing", lack.what, (BUILD, RUN), lack.remedy),)
    ok = "CPUExecutionProvider" in providers
    advice = None if ok else f"Install an ONNX Runtime with the CPU provider: {reinstall('onnxruntime')}"
    return (Check("providers", status(ok), ", ".join(providers), (BUILD, RUN), advice),)


def _tvm_tools() -> tuple[Check, ...]:
    """TVM's runtime, and the compilers of our kernels, each tried."""
    try:
        load_packages("tvm")
        checks = [Check("tvm runtime loads", "ok", "yes", (BUILD, RUN))]
    except MachineLacks as lack:
        checks = [Check("tvm runtime loads", "missing", lack.what, (BUILD, RUN), lack.remedy)]
    for arch in LEVELS:
        # without the cross compiler only targets of the other architecture cannot be built
        needed = (BUILD,) if arch == architecture() else ()
        try:
            checks.append(Check(f"compiler for {arch}", "ok", check_compiler(arch), needed))
        except MachineLacks as lack:
            checks.append(Check(f"compiler for {arch}", "missing", lack.what, needed, lack.remedy))
    return tuple(checks)


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: 2.13.0+cpu -> (2, 13, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()
