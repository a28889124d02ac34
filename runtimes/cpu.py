"""What the processor can do, in the names that Linux gives its features; bundles that need more are refused."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from arriero.errors import MachineLacks
from arriero.runtimes.cgroup import cpu_quota, read_text

# Bits of AT_HWCAP and AT_HWCAP2 on aarch64 (Linux: arch/arm64/include/uapi/asm/hwcap.h). The kernel's word counts
# there, not /proc/cpuinfo: an emulator answers the first for the processor it emulates, the second for its host.
HWCAP = {
    16: {1: "asimd", 7: "crc32", 8: "atomics", 10: "asimdhp", 12: "asimdrdm", 13: "jscvt", 14: "fcma", 15: "lrcpc"}
    | {20: "asimddp", 22: "sve"},
    26: {1: "sve2", 13: "i8mm", 14: "bf16"},
}
# The classes of machine that our kernels tell apart, the best first, and the feature in Linux's words that makes each.
MACHINE_CLASSES = {
    "x86_64": {
        "AMX": "amx_int8",
        "AVX-512 VNNI": "avx512_vnni",
        "AVX2 with VNNI": "avx_vnni",
        "AVX-512 without VNNI": "avx512f",
        "AVX2": "avx2",
    },
    "aarch64": {"ARM i8mm": "i8mm", "ARM dotprod": "asimddp", "ARM NEON": "asimd"},
}
SAME = {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}


def architecture(name: str | None = None) -> str:
    """One name for each architecture (x86_64, aarch64, ..); this machine's where `name` is None."""
    machine = (name or platform.machine()).lower()
    return SAME.get(machine, machine)


def cpu_features() -> frozenset[str]:
    """The features of this machine's processor; empty where the system does not tell."""
    if architecture() == "aarch64":
        ask = getattr(ctypes.CDLL(None), "getauxval", None)
        if ask is None:
            return frozenset()
        ask.restype, ask.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
        return frozenset(name for kind, names in HWCAP.items() for bit, name in names.items() if ask(kind) >> bit & 1)
    flags = re.search(r"^flags\s*:\s*(.+)$", read_text(Path("/proc/cpuinfo")), re.MULTILINE)
    return frozenset(flags.group(1).split()) if flags else frozenset()


def machine_class(arch: str, features: Collection[str]) -> str:
    """The best class of `arch` whose feature is among `features`; the architecture's name where none is."""
    return next((name for name, feature in MACHINE_CLASSES.get(arch, {}).items() if feature in features), arch)


def processor_name() -> str:
    """What the processor calls itself, or its architecture where the system does not tell."""
    model = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", read_text(Path("/proc/cpuinfo")), re.M)
    return model.group(1) if model else platform.processor() or platform.machine()


def describe_processor() -> str:
    """The processor's name, its class and the cores that this process may use, as a measurement has to name them."""
    cores = usable_cores()
    return f"{processor_name()}, {machine_class(architecture(), cpu_features())}, {cores} core{'s' * (cores > 1)}"


def usable_cores(root: Path = Path("/")) -> int:
    """The cores that this process may keep busy: those it may run on, or fewer where a control group limits its time.

    A part of a core counts as one. `root` is where proc and sys are looked up.
    """
    # the affinity mask, not the machine: inside a container they differ
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(root)
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def lacking_features(needed: Iterable[str]) -> list[str]:
    """Which of the features `needed` this processor lacks; none where the system does not tell."""
    have = cpu_features()
    return sorted(set(needed) - have) if have else []


def check_features(needed: Iterable[str], where: str) -> None:
    """Refuse what `where` asks for, with the features that this processor lacks. Raises MachineLacks."""
    if lacking := lacking_features(needed):
        raise MachineLacks(
            f"the bundle was compiled for a processor with {', '.join(lacking)}, which this one lacks",
            where=where,
            remedy="Build a target for this processor: `cpu: native` on this machine, or its name in the build file",
        )
