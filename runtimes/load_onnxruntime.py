"""ONNX Runtime, with its telemetry off: the one place that imports it.

From 1.29 on its Linux and macOS builds look up a collector when a session is opened, and write a persistent identifier
and a database under the user's cache. Its variable for a full opt-out counts when the library is loaded, no later.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

TELEMETRY = "ORT_DISABLE_TELEMETRY"


def load_onnxruntime() -> Any:
    """The module `onnxruntime`, telemetry off unless the environment already says otherwise. Raises ImportError."""
    os.environ.setdefault(TELEMETRY, "1")
    return import_module("onnxruntime")
