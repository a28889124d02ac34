"""ONNX Runtime, with its telemetry off: the one place that imports it.

From 1.29 on its Linux and macOS builds look up a collector when a session is opened, and write a persistent identifier
and a database under the user's cache. Its variable for a full opt-out counts when the library is loaded, no later.
"""

from __future__ import annotations

import os
import sys
import warnings
from importlib import import_module
from typing import Any

from arriero.errors import MachineLacks
from arriero.runtimes.broken_package import importing
from arriero.traits import install

TELEMETRY = "ORT_DISABLE_TELEMETRY"


def load_onnxruntime() -> Any:
    """The module `onnxruntime`, telemetry off unless the environment already says otherwise.

    Raises MachineLacks where the package is missing or does not load.
    Where an app imported it before, it notes nothing from here on, and a warning says what that leaves.
    """
    late = "onnxruntime" in sys.modules and TELEMETRY not in os.environ
    os.environ.setdefault(TELEMETRY, "1")
    remedy = f"Install it with `{install('onnxruntime')}`"
    with importing("onnxruntime", absent=MachineLacks("the package onnxruntime is not installed", remedy=remedy)):
        module = import_module("onnxruntime")
    if late:
        module.disable_telemetry_events()
        warnings.warn(
            "onnxruntime was imported before its telemetry could be switched off: it has written an identifier under "
            f"the user's cache and may look up its collector. Set {TELEMETRY}=1 before it is imported, or load a "
            "bundle first",
            RuntimeWarning,
            stacklevel=2,
        )
    return module
