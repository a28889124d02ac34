"""The class of machine that tests run on, in a line: what a failure on another machine is compared with."""

from __future__ import annotations

import os
import shutil
import signal

from arriero.export.proof.emulate import EMULATOR, VARIABLE
from arriero.runtimes.cpu import architecture, cpu_features, machine_class, usable_cores


def describe_machine() -> str:
    """The machine class, its cores, how Ctrl-C stands, and whether 64-bit ARM is there under emulation."""
    cores = usable_cores()
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    arm64 = "a whole machine" if os.environ.get(VARIABLE) else "kernels" if shutil.which(EMULATOR) else "none"
    return (
        f"machine class: {machine_class(architecture(), cpu_features())}, {cores} core{'s' * (cores > 1)}, "
        f"SIGINT {'ignored' if ignored else 'not ignored'} at the start, 64-bit ARM under emulation: {arm64}"
    )
