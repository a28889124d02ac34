"""Makes `arriero` this checkout, whatever is installed and whatever its folder is called; numpy and ml_dtypes suffice.

The package's own `__init__` is not run: it imports the runtime's packages, which a machine that only runs kernels need
not have. `arriero.tests` is this checkout's folder, so that an installed package called `tests` is not taken for it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]

if "arriero" not in sys.modules:
    package = ModuleType("arriero")
    package.__path__ = [str(ROOT)]
    sys.modules["arriero"] = package
