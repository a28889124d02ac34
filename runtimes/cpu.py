"""What the processor can do, in the names that Linux gives its features; bundles that need more are refused."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import re
from collections.abc import Iterable
from pathlib import Path

from arriero.errors import MachineLacks
from arriero.runtimes.cgroup import cpu_quota

# Bits of AT_HWCAP and AT_HWCAP2 on aarch64 (Linux: arch/arm64/include/uapi/asm/hwcap.h). The kernel's word counts
# there, not /proc/cpuinfo: an emulator answers the first for the processor it emulates, the second for its host.
HWCAP = {
    16: {1: "asimd", 7: "crc32", 8: "atomics", 10: "asimdhp", 12: "asimdrdm", 13: "jscvt", 14: "fcma", 15: "lrcpc"}
    | {20: "asimddp", 22: "sve"},
    26: {1: "sve2", 13: "i8mm", 14: "bf16"},
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
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    flags = re.search(r"^flags\s*:\s*(.+)$", info, re.MULTILINE)
    return frozenset(flags.group(1).split()) if flags else frozenset()


def usable_cores(root: Path = Path("/")) -> int:
    """The cores that this process may keep busy: those it may run on, or fewer where a control group limits its time.

    A part of a core counts as one. `root` is where proc and sys are looked up.
    """
    # the affinity mask, not the machine: inside a container they differ
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(root)
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def check_features(needed: Iterable[str], where: str) -> None:
    """Refuse what `where` asks for, with the features that this processor lacks. Raises MachineLacks."""
    have = cpu_features()
    lacking = sorted(set(needed) - have)
    if have and lacking:
        raise MachineLacks(
            f"the bundle was compiled for a processor with {', '.join(lacking)}, which this one lacks",
            where=where,
            remedy="Build a target for this processor: `cpu: native` on this machine, or its name in the build file",
        )
