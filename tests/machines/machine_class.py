"""The class of machine that tests run on, in a line: what a failure on another machine is compared with."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Collection

from arriero.export.proof.emulate import EMULATOR, VARIABLE
from arriero.runtimes.cpu import architecture, cpu_features, usable_cores

# The best first: the class, and the feature in Linux's words that makes it one.
CLASSES = {
    "x86_64": {
        "AMX": "amx_int8",
        "AVX-512 VNNI": "avx512_vnni",
        "AVX2 with VNNI": "avx_vnni",
        "AVX-512 without VNNI": "avx512f",
        "AVX2": "avx2",
    },
    "aarch64": {"ARM i8mm": "i8mm", "ARM dotprod": "asimddp", "ARM NEON": "asimd"},
}


def machine_class(arch: str, features: Collection[str]) -> str:
    """The best class of `arch` whose feature is among `features`; the architecture's name where none is."""
    return next((name for name, feature in CLASSES.get(arch, {}).items() if feature in features), arch)


def describe_machine() -> str:
    """The machine class, its cores, how Ctrl-C stands, and whether 64-bit ARM is there under emulation."""
    cores = usable_cores()
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    arm64 = "a whole machine" if os.environ.get(VARIABLE) else "kernels" if shutil.which(EMULATOR) else "none"
    return (
        f"machine class: {machine_class(architecture(), cpu_features())}, {cores} core{'s' * (cores > 1)}, "
        f"SIGINT {'ignored' if ignored else 'not ignored'} at the start, 64-bit ARM under emulation: {arm64}"
    )
