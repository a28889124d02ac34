"""The CPU kernels that the tests' compiled graphs link in."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def kernels(tvm_workshop: Path) -> Path:
    """The object file of our kernels for this machine."""
    (found,) = tvm_workshop.glob("bundles/.work/kernels-*/kernels.o")
    return found
