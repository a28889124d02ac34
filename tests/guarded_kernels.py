"""Kernels whose workspace is watched, and what their tests share."""

from __future__ import annotations

import numpy as np

from tests.call_kernels import ALIGNMENT, Kernels

# float32 sums of a few hundred terms, in any order
SUM_ERROR = 3e-6


class Guarded(Kernels):
    """Kernels whose workspace starts as NaNs and must not be overrun."""

    FENCE = 4096

    def _workspace(self, name, *sizes):
        size = len(super()._workspace(name, *sizes))
        self._space = np.full(size + self.FENCE + ALIGNMENT, 255, np.uint8)
        space = super()._workspace(name, *sizes)
        self._fence = self._space[space.ctypes.data + size - self._space.ctypes.data :]
        return space

    def _run(self, *arguments):
        super()._run(*arguments)
        assert (self._fence == 255).all()


def normal(draw, *shape):
    return draw.standard_normal(shape, dtype=np.float32)


def assert_close(found, wanted, magnitude, error=SUM_ERROR):
    assert found.shape == wanted.shape
    assert np.all(np.abs(found - wanted) <= error * magnitude)
